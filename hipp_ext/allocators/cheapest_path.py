"""Measured sensitivity -> how much of every group stays, at any budget.

What a plan loses is taken for the sum of what its groups lose alone. Then, on the convex hulls of the groups' curves, the best
allocation removes step by step where the next parameter costs least, and all budgets lie along one path.
"""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class CheapestPath:
    """`keep_shares(ratios)` -> the share of each group that stays when so much of all parameters goes.

    No share ever rises with the ratio. Beyond the last level that was measured of every group, shares stay as they are.

    Args:
        parameters: of each group.
        removed: shares of a group at which its loss was measured, ascending, above 0.
        losses: (groups, levels) what the model loses when one group alone is cut to each; 0 or more.

    Source: equal slopes on convex hulls, Shoham and Gersho, IEEE TASSP 36 (1988); exact where curves are convex.
    """

    def __init__(
        self,
        parameters: Sequence[int],
        removed: Sequence[float],
        losses: Float[Tensor, "groups levels"],
    ):
        total = sum(parameters)
        steps = []  # (loss per parameter, group, share removed by the step)
        for group, curve in enumerate(losses.double().tolist()):
            hull = _lower_hull([(0.0, 0.0), *zip(removed, curve, strict=True)])
            for before, after in itertools.pairwise(hull):
                steps.append(
                    (_slope(before, after) / parameters[group], group, after[0] - before[0])
                )
        steps.sort()
        removed_by = torch.zeros(len(steps) + 1, len(parameters), dtype=torch.float64)
        for row, (_, group, share) in enumerate(steps, 1):
            removed_by[row, group] = share
        self._shares = 1 - removed_by.cumsum(0)
        self._ratios = (1 - self._shares) @ torch.tensor(parameters, dtype=torch.float64) / total

    def keep_shares(self, ratios: Float[Tensor, " budgets"]) -> Float[Tensor, "budgets groups"]:
        """Shares at each pruning_ratio, float32."""
        wanted = ratios.double().clamp(0, float(self._ratios[-1]))
        after = torch.searchsorted(self._ratios, wanted).clamp_min(1)
        low, high = self._ratios[after - 1], self._ratios[after]
        way = ((wanted - low) / (high - low))[:, None]
        return torch.lerp(self._shares[after - 1], self._shares[after], way).float()


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
