"""Scores + preference -> plan: state, policy, reward, GRPO, archive, and the planner that joins them."""

from hipp_ext.planner.grpo import FitResult
from hipp_ext.planner.planner import FrontPlan, HiPPPlanner
from hipp_ext.planner.policy import Policy
from hipp_ext.planner.state import Signals, measure_signals

__all__ = ["FitResult", "FrontPlan", "HiPPPlanner", "Policy", "Signals", "measure_signals"]
