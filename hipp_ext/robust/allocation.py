"""Sensitivity per group -> how many channels each group keeps, under an exact budget."""

import math
from collections.abc import Sequence

import torch

from hipp_ext.budget import Bounds, Cost, check_ratio
from hipp_ext.errors import BudgetError

MIN_KEEP = 0.125  # of the channels of a group


def default_min_keep(pruning_ratio: float) -> float:
    """Least fraction of a group's channels where the uniform plan removes `pruning_ratio`.

    It is an eighth, but at most half of what a group keeps in the uniform plan, so that every ratio
    leaves a choice.
    """
    return min(MIN_KEEP, (1 - pruning_ratio) / 2)


def allocate(
    sensitivity: Sequence[float],
    widths: Sequence[int],
    cost: Cost,
    budget: int,
    *,
    alpha: float = 0.25,
    bounds: Bounds | None = None,
) -> list[int]:
    """Channels to keep per group; they cost at most `budget`, and one more in any group exceeds it.

    keep_i = width_i * clip(c * (sensitivity_i / geometric mean) ** alpha, min_keep, max_keep), with
    c as large as the budget allows. What rounding leaves is spent channel by channel, on the most
    sensitive groups first.

    Args:
        sensitivity: one number per group, at least zero; only ratios count.
        widths: channels of each group.
        cost: see `channel_costs`.
        budget: largest cost, in units of `cost`.
        alpha: 0 keeps the same fraction everywhere; larger values follow the sensitivity more
            closely.
        bounds: how few and how many channels a group may keep; None: at least MIN_KEEP.

    Raises:
        BudgetError: the budget is below the cost of the least keep counts, or a sensitivity is
            negative or not finite.

    Source: the idea of MRPF (arXiv 2410.15176), abstract.
    Differs from the paper: its map from sensitivity to ratios is not public; this one is ours. It
    is a soft map, because sharper ones failed in trials.
    """
    if len(sensitivity) != len(widths) or not all(math.isfinite(s) and s >= 0 for s in sensitivity):
        raise BudgetError(
            f"One finite sensitivity of at least zero per group is needed, {len(widths)} of them; "
            f"got {list(sensitivity)}."
        )
    logs = torch.tensor([max(s, 1e-8) for s in sensitivity], dtype=torch.float64).log()
    weights = (alpha * (logs - logs.mean())).exp().tolist()
    least, most = _limits(bounds, widths, cost, budget)

    def keep_counts(c: float) -> list[int]:
        rows = zip(widths, weights, least, most, strict=True)
        return [min(high, max(low, round(n * c * w))) for n, w, low, high in rows]

    low, high, best = 0.0, 1 / min(weights) + 1, least
    for _ in range(60):
        middle = (low + high) / 2
        if cost(keep_counts(middle)) <= budget:
            low, best = middle, keep_counts(middle)
        else:
            high = middle
    return spend(best, most, cost, budget, sorted(range(len(widths)), key=lambda i: -weights[i]))


def spend(
    keep_counts: Sequence[int], most: Sequence[int], cost: Cost, budget: int, order: Sequence[int]
) -> list[int]:
    """Add channels while the budget allows, one at a time to the groups in turn, in `order`."""
    result, growing = list(keep_counts), list(order)
    while growing:
        for i in list(growing):
            result[i] += 1
            if result[i] > most[i] or cost(result) > budget:
                result[i] -= 1
                growing.remove(i)
    return result


def uniform_counts(widths: Sequence[int], pruning_ratio: float) -> list[int]:
    """Channels to keep per group when each keeps the same fraction, and at least one channel.

    Raises:
        BudgetError: the ratio is not in [0, 1).
    """
    check_ratio(pruning_ratio)
    return [max(1, round(n * (1 - pruning_ratio))) for n in widths]


def global_counts(
    ranking: Sequence[torch.Tensor], cost: Cost, budget: int, *, bounds: Bounds | None = None
) -> list[int]:
    """Channels to keep per group when one threshold applies to the channels of all groups.

    Args:
        ranking: per group one score per channel, higher = keep; divided by the group's mean first.
        cost: see `channel_costs`.
        budget: largest cost, in units of `cost`.
        bounds: as for `allocate`.

    Raises:
        BudgetError: the budget is below the cost of the least keep counts.
    """
    scaled = [r.double() / r.double().mean().clamp_min(1e-30) for r in ranking]
    least, most = _limits(bounds, [len(r) for r in ranking], cost, budget)
    best = least
    low, high = 0, sum(len(r) for r in scaled)
    together = torch.cat(scaled).sort(descending=True).values
    while low < high:  # the largest number of channels whose cost fits
        middle = (low + high + 1) // 2
        threshold = together[middle - 1]
        keep_counts = [
            min(m, max(n, int((r >= threshold).sum())))
            for r, n, m in zip(scaled, least, most, strict=True)
        ]
        if cost(keep_counts) <= budget:
            low, best = middle, keep_counts
        else:
            high = middle - 1
    return spend(best, most, cost, budget, range(len(best)))


def _limits(
    bounds: Bounds | None, widths: Sequence[int], cost: Cost, budget: int
) -> tuple[list[int], list[int]]:
    """(least, most) keep counts; BudgetError where the least exceed the budget."""
    least, most = (bounds or Bounds(min_keep=MIN_KEEP)).of_widths(widths)
    if cost(least) > budget:
        raise BudgetError(
            f"A budget of {budget:,} {cost.name} cannot be met: the least allowed, {least} of "
            f"{list(widths)} channels, takes {cost(least):,}. Lower min_keep or raise the budget."
        )
    return least, most
