"""Uniform: the same fraction of every group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hipp_ext import budget
from hipp_ext.allocators.base import Allocator
from hipp_ext.groups import Group


@dataclass(frozen=True, kw_only=True)
class Uniform(Allocator):
    """Keeps the same fraction of the units of every group."""

    def keep_counts(
        self, groups: Sequence[Group], scores: Mapping[str, Tensor], measured: Any
    ) -> tuple[int, ...]:
        return budget.keep_counts(groups, None, self.pruning_ratio, self.bounds)
