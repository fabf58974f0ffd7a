"""Pruning in rounds: prune a little, recover by distillation from the dense model, prune again.

settings = ShrinkSettings(to=0.5, steps=4, recover=RecoverSettings(steps=400))
data = FileData("chats.jsonl", processor, holdout=0.02)
report = shrink("./model", data, settings, folder="./small")
"""

from hipp_ext.shrink.report import Round, ShrinkReport
from hipp_ext.shrink.settings import ShrinkSettings
from hipp_ext.shrink.shrinking import shrink

__all__ = ["Round", "ShrinkReport", "ShrinkSettings", "shrink"]
