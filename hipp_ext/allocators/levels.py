"""The keep counts that the bounds allow, as levels of each group."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hipp_ext.budget import Bounds, check_ratio, parameters_left
from hipp_ext.errors import BudgetError
from hipp_ext.groups import Group, total_parameters


@dataclass(frozen=True, kw_only=True, eq=False)
class Levels:
    """Allowed keep counts and their cost.

    Attributes:
        counts: allowed keep counts of each group, ascending: floor, floor + step, ..., largest;
            before them 0 where blocks may be dropped.
        costs: (groups,) parameters of one unit.
        total: prunable parameters.
        floor: parameters of the smallest plan, which keeps a block at least.
    """

    counts: tuple[np.ndarray, ...]
    costs: np.ndarray
    total: int
    floor: int

    @classmethod
    def of(cls, groups: Sequence[Group], bounds: Bounds) -> "Levels":
        """The levels of `groups` within `bounds`.

        Raises:
            BudgetError: the bounds let layers be dropped, whose blocks have no levels of their own,
                or layers have to be alike.
        """
        if bounds.shape != "free":
            raise BudgetError(
                f"shape={bounds.shape!r} needs an allocator that gives every group a fraction "
                "(Uniform, OWL, Sensitivity, HiPPPlanner); one threshold over all units makes "
                "every layer different."
            )
        if bounds.drop == "layers":
            raise BudgetError(
                "drop='layers' needs an allocator that gives every group a fraction (Uniform, OWL, "
                "Sensitivity, HiPPPlanner); one threshold over all units can drop blocks alone."
            )
        (least, step), most = bounds.steps(groups), bounds.most(groups)
        drops = [bounds.drop == "blocks" and g.droppable for g in groups]
        counts = [
            np.concatenate([[0] * gone, np.arange(low, high, s), [high]])
            for gone, low, high, s in zip(drops, least, most, step, strict=True)
        ]
        counts = [c.astype(np.int64) for c in counts]
        costs = np.array([g.unit_parameters for g in groups], dtype=np.int64)
        return cls(
            counts=tuple(counts),
            costs=costs,
            total=total_parameters(groups),
            floor=int(costs @ bounds.smallest(groups)),
        )

    @property
    def least(self) -> tuple[int, ...]:
        """The lowest level of every group."""
        return tuple(int(c[0]) for c in self.counts)

    def parameters(self, keep_counts: Sequence[int]) -> int:
        """Prunable parameters that stay."""
        return int(self.costs @ np.asarray(keep_counts, dtype=np.int64))

    def budget(self, pruning_ratio: float) -> int:
        """Number of parameters that may stay at a pruning_ratio, rounded as `keep_counts` does.

        Raises:
            BudgetError: the ratio is outside [0, 1), or the floors alone have more parameters.
        """
        check_ratio(pruning_ratio)
        budget = parameters_left(self.total, pruning_ratio)
        if self.floor > budget:
            most = 1 - self.floor / self.total
            raise BudgetError(
                f"pruning_ratio {pruning_ratio:g} cannot be met: the bounds let at most {most:.4f} "
                "go."
            )
        return budget

    def allows(self, keep_counts: Sequence[int]) -> bool:
        """Whether every keep count is a level of its group."""
        return len(keep_counts) == len(self.counts) and all(
            k in c for k, c in zip(keep_counts, self.counts, strict=True)
        )

    def level_of(self, group: int, keep: float) -> int:
        """Index of the highest level of a group that keeps at most `keep` units; at least 0."""
        return max(0, int(np.searchsorted(self.counts[group], keep, side="right")) - 1)

    def fill(
        self, keep_counts: Sequence[int], budget: int, values: Sequence[np.ndarray]
    ) -> tuple[int, ...]:
        """The counts, raised level by level until no next level of any group fits the budget.

        The parameters that stay are within one level of the budget and never above it.

        Args:
            keep_counts: allowed counts within the budget to start from.
            budget: number of parameters that may stay.
            values: for each group, the value of each step (entry i: from level i to i + 1). The
                step with the highest value is taken first, if it fits.
        """
        level = [self.level_of(g, k) for g, k in enumerate(keep_counts)]
        left = budget - self.parameters(keep_counts)
        heap: list[tuple[float, int]] = []

        def offer(group: int) -> None:
            if level[group] + 1 < len(self.counts[group]):
                heapq.heappush(heap, (-float(values[group][level[group]]), group))

        for group in range(len(level)):
            offer(group)
        while heap:
            # A step that does not fit now never will, because the rest of the budget only shrinks.
            _, group = heapq.heappop(heap)
            now, then = self.counts[group][level[group] : level[group] + 2]
            price = int((then - now) * self.costs[group])
            if price <= left:
                left, level[group] = left - price, level[group] + 1
                offer(group)
        return tuple(int(c[i]) for c, i in zip(self.counts, level, strict=True))
