"""Allocation + budget -> exact integer keep counts: `Cost`, `Bounds`, `keep_counts`."""

from hipp_ext.budget.bounds import MIN_KEEP, Bounds, Drop, Part, Shape
from hipp_ext.budget.cost import Cost
from hipp_ext.budget.counts import (
    check_ratio,
    keep_counts,
    largest_ratio,
    many_keep_counts,
    max_ratio,
    parameters_left,
)
from hipp_ext.budget.uniform import uniform_plans

__all__ = [
    "MIN_KEEP",
    "Bounds",
    "Cost",
    "Drop",
    "Part",
    "Shape",
    "check_ratio",
    "keep_counts",
    "largest_ratio",
    "many_keep_counts",
    "max_ratio",
    "parameters_left",
    "uniform_plans",
]
