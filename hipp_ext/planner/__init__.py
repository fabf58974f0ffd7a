"""The learned allocator: a preference and measured signals -> a plan, by a trained policy."""

from hipp_ext.planner.answers import Answers, ParetoPlan
from hipp_ext.planner.planner import HiPPPlanner
from hipp_ext.planner.policy import Policy
from hipp_ext.planner.settings import FitResult, FitSettings
from hipp_ext.planner.state import Signals, measure_signals

__all__ = [
    "Answers",
    "FitResult",
    "FitSettings",
    "HiPPPlanner",
    "ParetoPlan",
    "Policy",
    "Signals",
    "measure_signals",
]
