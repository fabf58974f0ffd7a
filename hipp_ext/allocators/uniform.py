"""Uniform: the same fraction of every group."""

from dataclasses import dataclass
from typing import Any

from hipp_ext import budget
from hipp_ext.allocators.base import Allocator
from hipp_ext.scorers.base import Groups, Scores


@dataclass(frozen=True, kw_only=True)
class Uniform(Allocator):
    """Keeps the same fraction of the units of every group."""

    def keep_counts(self, groups: Groups, scores: Scores, measured: Any) -> tuple[int, ...]:
        return budget.keep_counts(groups, None, self.pruning_ratio, self.bounds)
