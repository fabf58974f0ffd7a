"""Allocation + budget -> exact integer keep counts.

An allocation says how strongly each group should be kept (one logit per group; only differences
count). The budget says how much may stay in all. Every allocator meets every budget exactly,
because one function turns allocations into keep counts.
"""

import math
from collections.abc import Sequence

import numpy as np

from hipp_ext.budget.bounds import Bounds
from hipp_ext.budget.cost import Cost
from hipp_ext.budget.uniform import distances, uniform_counts
from hipp_ext.errors import BudgetError
from hipp_ext.groups import Group
from hipp_ext.quantities import finite


def keep_counts(
    groups: Sequence[Group],
    allocation: Sequence[float] | None,
    pruning_ratio: float,
    bounds: Bounds | None = None,
    cost: Cost | None = None,
) -> tuple[int, ...]:
    """Keep counts, one per group, that remove at least `pruning_ratio` and not one step more.

    Every group keeps the fraction sigmoid(allocation + shift) of its units. The common shift is
    found by bisection, the fractions are rounded to allowed counts, and what is left of the budget
    is spent on the groups that rounding hurt most until no further step of any group fits. So the
    cost of what stays is within one step (one unit, or `round_to` columns) of the budget and never
    above it, unless every group keeps as much as the bounds allow. A higher allocation never yields
    a lower count than an equal group with a lower one, up to that last step. Where the bounds let
    blocks be dropped, a group whose fraction is nearer to nothing than to its least count keeps
    nothing, and the rest of the budget goes to groups that keep something. Where all layers have to
    be alike, the plan is the one nearest to the allocation of those that cannot keep more, see
    `uniform_counts`.

    Args:
        groups: from `find_groups`.
        allocation: one finite logit per group, higher = keep more; only differences count. None:
            all groups are treated alike.
        pruning_ratio: removed cost / cost of all groups, in [0, 1).
        bounds: which keep counts are allowed.
        cost: what the ratio counts; None: parameters.

    Raises:
        BudgetError: the ratio is outside [0, 1) or cannot be reached within the bounds (the message
            gives the bounds, and the largest ratio that can be reached), or the allocation does not
            fit the groups.
    """
    bounds = bounds or Bounds()
    logits = (
        np.zeros(len(groups)) if allocation is None else np.asarray(allocation, dtype=np.float64)
    )
    if logits.shape != (len(groups),) or not np.isfinite(logits).all():
        raise BudgetError(
            f"The allocation needs {len(groups)} finite numbers, one per group; got {allocation!r}."
        )
    check_ratio(pruning_ratio)
    counted = cost or Cost.parameters(groups)
    target = parameters_left(counted([g.width for g in groups]), pruning_ratio)
    fitting = [b for b in bounds.alternatives if counted(b.smallest(groups)) <= target]
    if not fitting:
        raise BudgetError(_unreachable(groups, counted, pruning_ratio, bounds))
    plans = [_counts(groups, logits, target, b, counted) for b in fitting]
    return min(plans, key=lambda counts: float(distances(groups, np.array(counts), logits)))


def _counts(
    groups: Sequence[Group], logits: np.ndarray, target: int, bounds: Bounds, cost: Cost
) -> tuple[int, ...]:
    """The keep counts of one shape; their cost is at most `target`, which can be met."""
    targets = np.array([target])
    if bounds.shape == "uniform":
        return tuple(uniform_counts(groups, logits[None], targets, bounds, cost)[0].tolist())
    decoder = _Decoder(groups, bounds, cost)
    counts, exact = decoder.counts(logits[None], targets)
    return _spend_rest(counts[0], exact[0], decoder, target)


def many_keep_counts(
    groups: Sequence[Group],
    allocations: np.ndarray,
    pruning_ratios: np.ndarray,
    bounds: Bounds | None = None,
) -> np.ndarray:
    """(plans, groups) keep counts of many plans: those of `keep_counts` before the rest is spent.

    They never exceed the budget in parameters. A ratio that the bounds do not allow gives the least
    counts. This is for plans that a surrogate judges, and that are not carried out.

    Args:
        allocations: (plans, groups) logits.
        pruning_ratios: (plans,)
    """
    cost, bounds = Cost.parameters(groups), bounds or Bounds()
    logits, total = np.asarray(allocations, dtype=np.float64), cost([g.width for g in groups])
    targets = np.array([parameters_left(total, ratio) for ratio in pruning_ratios.tolist()])
    plans = [
        uniform_counts(groups, logits, targets, b)
        if b.shape == "uniform"
        else _Decoder(groups, b, cost).counts(logits, targets)[0]
        for b in bounds.alternatives
    ]
    far = [
        np.where(cost.many(counts) <= targets, distances(groups, counts, logits), np.inf)
        for counts in plans
    ]
    return np.where((far[0] <= far[-1])[:, None], plans[0], plans[-1])


class _Decoder:
    """Allocations -> keep counts, one row per plan."""

    def __init__(self, groups: Sequence[Group], bounds: Bounds, cost: Cost):
        self.groups, self.cost = groups, cost
        self.widths = np.array([g.width for g in groups], dtype=np.int64)
        (self.least, self.step), self.most = bounds.steps(groups), bounds.most(groups)
        self.parts = None
        if bounds.drop != "none":
            self.parts = bounds.dropped_together(groups)
            self.smallest = bounds.smallest(groups)

    def counts(self, logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(counts, counts before rounding) at the largest shift whose counts fit each target."""
        low, high = -41 - logits.max(1), 41 - logits.min(1)
        for _ in range(48):
            middle = (low + high) / 2
            fits = self.cost.many(self._nearest(self._exact(logits, middle))) <= targets
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        exact = self._exact(logits, low)
        return self._nearest(exact), exact

    def _exact(self, logits: np.ndarray, shift: np.ndarray) -> np.ndarray:
        return self.widths / (1 + np.exp(-np.clip(logits + shift[:, None], -40, 40)))

    def _nearest(self, exact: np.ndarray) -> np.ndarray:
        # To the nearest, not down: 7.6 of eight heads must not become 7 in every layer at once.
        counts = (
            self.least
            + np.maximum(np.floor((exact - self.least) / self.step + 0.5), 0).astype(np.int64)
            * self.step
        )
        counts = np.minimum(counts, self.most)
        return counts if self.parts is None else self._dropped(counts, exact)

    def _dropped(self, counts: np.ndarray, exact: np.ndarray) -> np.ndarray:
        """`counts`, and nothing where that is nearer; a tower that would lose all keeps its
        least.
        """
        assert self.parts is not None
        stays = 2 * exact >= self.least
        stays = ((stays @ self.parts.T > 0) @ self.parts > 0) | ~self.parts.any(0)
        for tower in {g.tower for g in self.groups}:
            of_tower = np.array([g.tower == tower for g in self.groups])
            empty = ~stays[:, of_tower].any(1)
            stays[empty] |= of_tower & (self.smallest > 0)
        return np.where(stays, counts, 0)


def parameters_left(total: int, pruning_ratio: float) -> int:
    """How many of `total` may stay; the rounding error of a ratio costs no parameter."""
    return math.floor((1 - pruning_ratio) * total + 1e-6)


def check_ratio(pruning_ratio: float, name: str = "pruning_ratio") -> None:
    """Raise BudgetError, which says `name`, unless `pruning_ratio` is a number in [0, 1)."""
    number = finite(pruning_ratio)
    if number is None or not 0 <= number < 1:
        raise BudgetError(
            f"{name}={pruning_ratio!r}: a number in [0, 1) is needed (fraction removed)."
        )


def max_ratio(groups: Sequence[Group], bounds: Bounds | None = None) -> float:
    """The largest pruning_ratio, in parameters, that `bounds` allow."""
    cost = Cost.parameters(groups)
    smallest = (bounds or Bounds()).smallest(groups)
    return 1 - cost(smallest) / cost([g.width for g in groups])


def largest_ratio(groups: Sequence[Group], bounds: Bounds | None = None) -> float:
    """The largest pruning_ratio that can be requested: `max_ratio` less a margin for rounding."""
    return max(0.0, max_ratio(groups, bounds) - 1e-6)


def _unreachable(groups: Sequence[Group], cost: Cost, pruning_ratio: float, bounds: Bounds) -> str:
    least = bounds.smallest(groups)
    floors = ", ".join(
        f"{g.name} >= {f} of {g.width}" for g, f in zip(groups[:6], least, strict=False)
    )
    reached = 1 - cost(least) / cost([g.width for g in groups])
    shape = "" if bounds.shape == "free" else f" and shape {bounds.shape}"
    drop = "" if bounds.drop == "none" else f" and drop {bounds.drop}"
    return (
        f"pruning_ratio {pruning_ratio:g} cannot be met with min_keep {bounds.min_keep} and "
        f"round_to {bounds.round_to}{drop}{shape}: at most {reached:.4f} can go. "
        f"Least keep counts: {floors}{', ...' if len(groups) > 6 else ''}."
    )


def _spend_rest(
    counts: np.ndarray, exact: np.ndarray, decoder: _Decoder, target: int
) -> tuple[int, ...]:
    """Raise counts step by step while any step fits, largest rounding loss first."""
    cost, widths, step, most = decoder.cost, decoder.widths, decoder.step, decoder.most
    while True:
        grow = np.where(counts > 0, np.minimum(counts + step, most) - counts, 0)
        fitting = (grow > 0) & (cost.increases(counts, grow) <= target - cost(counts))
        if not fitting.any():
            return tuple(int(k) for k in counts)
        i = int(np.argmax(np.where(fitting, (exact - counts) / widths, -np.inf)))
        counts[i] += grow[i]
