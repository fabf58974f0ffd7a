"""Measured sensitivity -> how much of every group stays, at any budget.

The loss of a plan is taken to be the sum of the losses of its groups. The best allocation then
follows the convex hulls of the groups' curves: it removes step by step where the next parameter
costs least, and the allocations of all budgets lie along one path.
"""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class CheapestPath:
    """`keep_fractions(ratios)`: the fraction of each group that stays at each pruning_ratio.

    No fraction ever rises with the ratio. Beyond the last measured level of every group, fractions
    stay as they are.

    Args:
        parameters: number of parameters of each group.
        levels: removed fractions of a group at which its loss was measured, ascending, above 0.
        losses: (groups, levels) loss of the model when one group alone is pruned; 0 or more.

    Source: equal slopes on convex hulls, Shoham and Gersho, IEEE TASSP 36 (1988); exact where the
    curves are convex.
    """

    def __init__(
        self,
        parameters: Sequence[int],
        levels: Sequence[float],
        losses: Float[Tensor, "groups levels"],
    ):
        total = sum(parameters)
        steps = []  # (loss per parameter, group, fraction removed by the step)
        for group, curve in enumerate(losses.double().tolist()):
            hull = _lower_hull([(0.0, 0.0), *zip(levels, curve, strict=True)])
            for before, after in itertools.pairwise(hull):
                slope = _slope(before, after) / parameters[group]
                steps.append((slope, group, after[0] - before[0]))
        steps.sort()
        removed = torch.zeros(len(steps) + 1, len(parameters), dtype=torch.float64)
        for row, (_, group, fraction) in enumerate(steps, 1):
            removed[row, group] = fraction
        self._fractions = 1 - removed.cumsum(0)
        self._ratios = (1 - self._fractions) @ torch.tensor(parameters, dtype=torch.float64) / total

    def keep_fractions(self, ratios: Float[Tensor, " budgets"]) -> Float[Tensor, "budgets groups"]:
        """Fractions that stay at each pruning_ratio, float32."""
        asked = ratios.double().clamp(0, float(self._ratios[-1]))
        after = torch.searchsorted(self._ratios, asked).clamp_min(1)
        low, high = self._ratios[after - 1], self._ratios[after]
        way = ((asked - low) / (high - low))[:, None]
        return torch.lerp(self._fractions[after - 1], self._fractions[after], way).float()


def _lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the largest convex function below the points, which ascend in x."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])
