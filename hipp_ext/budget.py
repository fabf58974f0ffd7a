"""Allocation + budget -> exact integer keep counts.

An allocation says how strongly each group should be kept (one logit per group; only differences count). The budget
says how much may stay in all. Between the two lies one function, so that every allocator meets every budget exactly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hipp_ext.errors import BudgetError
from hipp_ext.groups import Group
from hipp_ext.quantities import finite, whole

MIN_KEEP = 0.1


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a keep count of one group may be.

    Attributes:
        round_to: the columns that stay are a multiple of this (kernels and quantisation groups like 64 or 128). A group
            that stays whole is always allowed. 1: no constraint.
        min_keep: least share of the units of a group that stays, in [0, 1]; at least one unit always does. A mapping
            from group name to share sets it for single groups, the default serves the others.
    """

    round_to: int = 1
    min_keep: float | Mapping[str, float] = MIN_KEEP

    def __post_init__(self) -> None:
        multiple = whole(self.round_to)
        if multiple is None or not 1 <= multiple < 2**31:  # numpy counts in 64 bits
            raise BudgetError(f"round_to={self.round_to!r}: a whole number of 1 or more is needed.")
        object.__setattr__(self, "round_to", multiple)
        shares = self.min_keep if isinstance(self.min_keep, Mapping) else {"": self.min_keep}
        plain = {}  # numpy's numbers are no JSON
        for name, given in shares.items():
            share = finite(given)
            if share is None or not 0 <= share <= 1:
                raise BudgetError(f"min_keep={given!r}: a share between 0 and 1 is needed.")
            plain[name] = share
        object.__setattr__(
            self, "min_keep", plain if isinstance(self.min_keep, Mapping) else plain[""]
        )

    def steps(self, groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
        """(least allowed keep count, units per step) of every group; the full width is allowed on top."""
        if isinstance(self.min_keep, Mapping) and (
            unknown := set(self.min_keep) - {g.name for g in groups}
        ):
            raise BudgetError(f"min_keep names groups that are not there: {sorted(unknown)}.")
        widths = np.array([g.width for g in groups], dtype=np.int64)
        step = np.array([g.multiple(self.round_to) for g in groups], dtype=np.int64)
        floor = np.maximum(1, np.ceil([self._share(g) * g.width - 1e-9 for g in groups])).astype(
            np.int64
        )
        return np.minimum(-(-floor // step) * step, widths), step

    def allow(self, groups: Sequence[Group], counts: np.ndarray) -> np.ndarray:
        """Whether all keep counts of a plan are allowed; counts (plans, groups) -> (plans,) of bool."""
        least, step = self.steps(groups)
        whole = counts == np.array([g.width for g in groups])
        return (whole | ((counts >= least) & ((counts - least) % step == 0))).all(1)

    def _share(self, group: Group) -> float:
        return (
            self.min_keep.get(group.name, MIN_KEEP)
            if isinstance(self.min_keep, Mapping)
            else self.min_keep
        )


def keep_counts(
    groups: Sequence[Group],
    allocation: Sequence[float] | None,
    pruning_ratio: float,
    bounds: Bounds | None = None,
) -> tuple[int, ...]:
    """Keep counts, one per group, that remove at least `pruning_ratio` of the parameters and not one step more.

    Every group keeps the share sigmoid(allocation + shift) of its units; the shift common to all is bisected, the
    shares are rounded to allowed counts, and what is left of the budget is spent on the groups that rounding hurt most
    until no further step of any group fits. So the parameters kept are within one step (one unit, or
    `round_to` columns) of the budget, never above it, and a higher allocation never yields a lower count than an equal
    group with a lower one, up to that last step.

    Args:
        groups: from `find_groups`.
        allocation: one finite logit per group, higher = keep more; only differences count. None: all alike.
        pruning_ratio: parameters removed / prunable parameters, in [0, 1).
        bounds: rounding and floors.

    Raises:
        BudgetError: the ratio is outside [0, 1) or cannot be reached within the bounds (the message says which
            bounds, and the largest ratio that can), or the allocation does not fit the groups.
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
    decoder = _Decoder(groups, bounds)
    target = parameters_left(decoder.total, pruning_ratio)
    if int(decoder.cost @ decoder.least) > target:
        raise BudgetError(_unreachable(decoder, pruning_ratio, bounds))
    counts, wanted = decoder.counts(logits[None], np.array([target]))
    return _spend_rest(counts[0], wanted[0], decoder, target)


def many_keep_counts(
    groups: Sequence[Group],
    allocations: np.ndarray,
    pruning_ratios: np.ndarray,
    bounds: Bounds | None = None,
) -> np.ndarray:
    """(plans, groups) keep counts for many plans at once: those of `keep_counts` before what rounding left is spent.

    Never above the budget. A ratio that the bounds do not allow gives the least counts. For plans that are only imagined.

    Args:
        allocations: (plans, groups) logits.
        pruning_ratios: (plans,)
    """
    decoder = _Decoder(groups, bounds or Bounds())
    targets = np.array([parameters_left(decoder.total, ratio) for ratio in pruning_ratios.tolist()])
    return decoder.counts(np.asarray(allocations, dtype=np.float64), targets)[0]


class _Decoder:
    """Allocations -> keep counts, a row per plan."""

    def __init__(self, groups: Sequence[Group], bounds: Bounds):
        self.groups = groups
        self.cost = np.array([g.unit_parameters for g in groups], dtype=np.int64)
        self.widths = np.array([g.width for g in groups], dtype=np.int64)
        self.least, self.step = bounds.steps(groups)
        self.total = int(self.cost @ self.widths)

    def counts(self, logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(counts, wished-for counts before rounding): the largest common shift whose counts fit each plan's target."""
        low, high = -41 - logits.max(1), 41 - logits.min(1)
        for _ in range(48):
            middle = (low + high) / 2
            fits = self._nearest(self._wanted(logits, middle)) @ self.cost <= targets
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        wanted = self._wanted(logits, low)
        return self._nearest(wanted), wanted

    def _wanted(self, logits: np.ndarray, shift: np.ndarray) -> np.ndarray:
        return self.widths / (1 + np.exp(-np.clip(logits + shift[:, None], -40, 40)))

    def _nearest(self, wanted: np.ndarray) -> np.ndarray:
        # To the nearest, not down: of eight heads, a wish for 7.6 must not become 7 in every layer at once.
        counts = (
            self.least
            + np.maximum(np.floor((wanted - self.least) / self.step + 0.5), 0).astype(np.int64)
            * self.step
        )
        return np.minimum(counts, self.widths)


def parameters_left(total: int, pruning_ratio: float) -> int:
    """How many of `total` parameters may stay; what rounding adds to a ratio costs no parameter."""
    return math.floor((1 - pruning_ratio) * total + 1e-6)


def check_ratio(pruning_ratio: float) -> None:
    """Raise BudgetError unless `pruning_ratio` is a number in [0, 1)."""
    number = finite(pruning_ratio)
    if number is None or not 0 <= number < 1:
        raise BudgetError(
            f"pruning_ratio={pruning_ratio!r}: a number in [0, 1) is needed (the share that is removed)."
        )


def max_ratio(groups: Sequence[Group], bounds: Bounds | None = None) -> float:
    """The largest pruning_ratio that `bounds` allow."""
    cost = np.array([g.unit_parameters for g in groups], dtype=np.int64)
    least, _ = (bounds or Bounds()).steps(groups)
    return 1 - int(cost @ least) / int(cost @ np.array([g.width for g in groups]))


def largest_ratio(groups: Sequence[Group], bounds: Bounds | None = None) -> float:
    """The largest pruning_ratio that may be asked for: `max_ratio` less a margin for rounding, at least 0."""
    return max(0.0, max_ratio(groups, bounds) - 1e-6)


def _unreachable(decoder: _Decoder, pruning_ratio: float, bounds: Bounds) -> str:
    groups, least = decoder.groups, decoder.least
    tight = ", ".join(
        f"{g.name} >= {f} of {g.width}" for g, f in zip(groups[:6], least, strict=False)
    )
    return (
        f"pruning_ratio {pruning_ratio:g} cannot be met with min_keep {bounds.min_keep} and round_to {bounds.round_to}: "
        f"at most {1 - int(decoder.cost @ least) / decoder.total:.4f} can go. "
        f"Floors: {tight}{', ...' if len(groups) > 6 else ''}."
    )


def _spend_rest(
    counts: np.ndarray, wanted: np.ndarray, decoder: _Decoder, target: int
) -> tuple[int, ...]:
    """Raise counts step by step, the largest shortfall (as a share of the width) first, while any step fits."""
    cost, widths, step = decoder.cost, decoder.widths, decoder.step
    grow = np.minimum(counts + step, widths) - counts
    left = target - int(cost @ counts)
    while True:
        fitting = (grow > 0) & (cost * grow <= left)
        if not fitting.any():
            return tuple(int(k) for k in counts)
        i = int(np.argmax(np.where(fitting, (wanted - counts) / widths, -np.inf)))
        left -= int(cost[i] * grow[i])
        counts[i] += grow[i]
        grow[i] = min(step[i], widths[i] - counts[i])
