"""hipp-ext: pruning plans for vision-language models.

plan = HiPPPlanner(Preference(utility=0.4, robustness=0.4, compression=0.2)).plan(model)
small = prune(model, plan)
"""

from hipp_ext.checkpoint import load_pruned, pad_to_uniform, save_pruned
from hipp_ext.plan import PruningPlan
from hipp_ext.planner import HiPPPlanner
from hipp_ext.preference import Preference
from hipp_ext.surgery import masked, prune

__all__ = [
    "HiPPPlanner",
    "Preference",
    "PruningPlan",
    "load_pruned",
    "masked",
    "pad_to_uniform",
    "prune",
    "save_pruned",
]
__version__ = "0.1.0"
