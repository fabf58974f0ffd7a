"""Scores + preference -> plan: state, policy, reward, GRPO, archive, and the planner that joins them."""

from hipp_ext.planner.fit import FitResult, FitSettings
from hipp_ext.planner.planner import FrontPlan, HiPPPlanner
from hipp_ext.planner.policy import Policy
from hipp_ext.planner.state import Signals, measure_signals

__all__ = [
    "FitResult",
    "FitSettings",
    "FrontPlan",
    "HiPPPlanner",
    "Policy",
    "Signals",
    "measure_signals",
]
