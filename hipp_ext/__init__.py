"""hipp-ext: pruning plans for vision-language models.

plan = HiPPPlanner(Preference(utility=0.4, robustness=0.4, compression=0.2)).plan(model)
small = prune(model, plan)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hipp_ext.calibration import Calibration
    from hipp_ext.plan import PruningPlan
    from hipp_ext.planner import HiPPPlanner
    from hipp_ext.preference import Preference
    from hipp_ext.surgery.checkpoint import load_pruned, pad_to_uniform, save_pruned
    from hipp_ext.surgery.masks import masked
    from hipp_ext.surgery.prune import prune

__all__ = [
    "Calibration",
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

# Names are imported when they are asked for (PEP 562), so that importing one part, as commands do,
# does not wait for all.
_HOMES = {
    "Calibration": "calibration",
    "HiPPPlanner": "planner",
    "Preference": "preference",
    "PruningPlan": "plan",
    "load_pruned": "surgery.checkpoint",
    "masked": "surgery.masks",
    "pad_to_uniform": "surgery.checkpoint",
    "prune": "surgery.prune",
    "save_pruned": "surgery.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
