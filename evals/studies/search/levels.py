"""The keep counts that the bounds allow, as a ladder of levels per group; every baseline climbs the same ladder."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hipp_ext.budget import Bounds, check_ratio, parameters_left
from hipp_ext.errors import BudgetError
from hipp_ext.groups import Group


@dataclass(frozen=True, kw_only=True, eq=False)
class Levels:
    """Allowed keep counts and what they cost.

    Attributes:
        counts: for every group its allowed keep counts, ascending: floor, floor + step, ..., full width.
        costs: (G,) parameters of one unit.
    """

    counts: tuple[np.ndarray, ...]
    costs: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[Group], bounds: Bounds) -> "Levels":
        """The ladder of `groups` within `bounds`."""
        least, step = bounds.steps(groups)
        counts = [
            np.append(np.arange(low, g.width, s), g.width)
            for g, low, s in zip(groups, least, step, strict=True)
        ]
        return cls(
            counts=tuple(counts),
            costs=np.array([g.unit_parameters for g in groups], dtype=np.int64),
        )

    @property
    def least(self) -> tuple[int, ...]:
        """The smallest plan."""
        return tuple(int(c[0]) for c in self.counts)

    @property
    def total(self) -> int:
        """Prunable parameters."""
        return int(sum(cost * int(c[-1]) for cost, c in zip(self.costs, self.counts, strict=True)))

    def parameters(self, keeps: Sequence[int]) -> int:
        """Prunable parameters that stay."""
        return int(self.costs @ np.asarray(keeps, dtype=np.int64))

    def budget(self, pruning_ratio: float) -> int:
        """Parameters that may stay when `pruning_ratio` of them go, rounded as `keep_counts` does.

        Raises:
            BudgetError: the ratio is outside [0, 1), or the floors alone cost more.
        """
        check_ratio(pruning_ratio)
        budget = parameters_left(self.total, pruning_ratio)
        if (floor := self.parameters(self.least)) > budget:
            most = 1 - floor / self.total
            raise BudgetError(
                f"pruning_ratio {pruning_ratio:g} cannot be met: the bounds let at most {most:.4f} go."
            )
        return budget

    def allows(self, keeps: Sequence[int]) -> bool:
        """Whether every keep count is a level of its group."""
        return len(keeps) == len(self.counts) and all(
            k in c for k, c in zip(keeps, self.counts, strict=True)
        )

    def level_of(self, group: int, keep: float) -> int:
        """Index of the highest level of a group that keeps at most `keep` units; 0 where none does."""
        return max(0, int(np.searchsorted(self.counts[group], keep, side="right")) - 1)

    def fill(
        self, keeps: Sequence[int], budget: int, values: Sequence[np.ndarray]
    ) -> tuple[int, ...]:
        """`keeps`, raised level by level until no next level of any group fits the budget.

        So the parameters that stay come within one level of the budget and never above it.

        Args:
            keeps: allowed counts within the budget, where to start.
            budget: parameters that may stay.
            values: per group, what each climb is worth (entry i: from level i to i + 1); the next climb with the highest
                value is made first, if it fits.
        """
        level = [self.level_of(g, k) for g, k in enumerate(keeps)]
        left = budget - self.parameters(keeps)
        heap: list[tuple[float, int]] = []

        def offer(group: int) -> None:
            if level[group] + 1 < len(self.counts[group]):
                heapq.heappush(heap, (-float(values[group][level[group]]), group))

        for group in range(len(level)):
            offer(group)
        while heap:
            # What does not fit now never will: what is left only shrinks. So its group is closed.
            _, group = heapq.heappop(heap)
            now, then = self.counts[group][level[group] : level[group] + 2]
            price = int((then - now) * self.costs[group])
            if price <= left:
                left, level[group] = left - price, level[group] + 1
                offer(group)
        return tuple(int(c[i]) for c, i in zip(self.counts, level, strict=True))
