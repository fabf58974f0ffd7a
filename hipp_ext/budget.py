"""Allocation + budget -> exact integer keep counts.

An allocation says how strongly each group should be kept (one logit per group; only differences
count). The budget says how much may stay in all. Every allocator meets every budget exactly,
because one function turns allocations into keep counts.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from hipp_ext.errors import BudgetError
from hipp_ext.groups import Group
from hipp_ext.quantities import finite, whole

MIN_KEEP = 0.1
Drop = Literal["none", "blocks", "layers"]


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Which keep counts a group may have.

    Attributes:
        round_to: the input columns that stay are a multiple of this (kernels and quantisation
            groups prefer 64 or 128). A group that stays whole is always allowed. 1: no constraint.
        min_keep: least fraction of the units of a group that stays, in [0, 1]; at least one unit
            always stays. A mapping from group name to fraction sets it for single groups; the
            default applies to the others.
        max_keep: largest fraction of the units of a group that stays, in [min_keep, 1].
        drop: "blocks": a group may also keep nothing, then its attention or FFN block is dropped;
            "layers": only both blocks of a layer together; "none": no block is dropped. A tower
            always keeps one block, or layer, at least.
    """

    round_to: int = 1
    min_keep: float | Mapping[str, float] = MIN_KEEP
    max_keep: float = 1.0
    drop: Drop = "none"

    def __post_init__(self) -> None:
        multiple = whole(self.round_to)
        if multiple is None or not 1 <= multiple < 2**31:  # numpy counts in 64 bits
            raise BudgetError(f"round_to={self.round_to!r}: a whole number of 1 or more is needed.")
        # Plain numbers, because numpy's cannot be written as JSON.
        object.__setattr__(self, "round_to", multiple)
        object.__setattr__(self, "max_keep", _fraction("max_keep", self.max_keep))
        if isinstance(self.min_keep, Mapping):
            fractions = {n: _fraction("min_keep", f) for n, f in self.min_keep.items()}
            object.__setattr__(self, "min_keep", fractions)
            largest = max(fractions.values(), default=0.0)
        else:
            largest = _fraction("min_keep", self.min_keep)
            object.__setattr__(self, "min_keep", largest)
        if largest > self.max_keep:
            raise BudgetError(f"min_keep={self.min_keep} is larger than max_keep={self.max_keep}.")
        if self.drop not in get_args(Drop):
            raise BudgetError(f"drop={self.drop!r}: one of {get_args(Drop)} is needed.")

    def steps(self, groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
        """(least keep count that is no drop, units per step) of every group; see also `most`."""
        if isinstance(self.min_keep, Mapping) and (
            unknown := set(self.min_keep) - {g.name for g in groups}
        ):
            raise BudgetError(f"min_keep names groups that are not there: {sorted(unknown)}.")
        step = np.array([g.multiple(self.round_to) for g in groups], dtype=np.int64)
        fractions = [self._min_keep(g.name) for g in groups]
        return _least(fractions, [g.width for g in groups], step), step

    def most(self, groups: Sequence[Group]) -> np.ndarray:
        """Largest allowed keep count of every group."""
        least, step = self.steps(groups)
        return _most(self.max_keep, [g.width for g in groups], least, step)

    def smallest(self, groups: Sequence[Group]) -> np.ndarray:
        """Keep counts of the plan that removes most."""
        least, _ = self.steps(groups)
        if self.drop == "none":
            return least
        parts = _droppable(groups, self.drop)
        cost = np.array([g.unit_parameters for g in groups], dtype=np.int64) * least
        smallest = np.zeros_like(least)
        for tower in {g.tower for g in groups}:
            rows = [r for r in parts if groups[int(np.argmax(r))].tower == tower]
            cheapest = min(rows, key=lambda row: int(cost[row].sum()))
            smallest[cheapest] = least[cheapest]
        return smallest

    def of_widths(self, widths: Sequence[int]) -> tuple[list[int], list[int]]:
        """(least, most) keep counts of groups of these widths, whose units are single channels.

        Raises:
            BudgetError: `min_keep` is a mapping, and widths have no names.
        """
        if isinstance(self.min_keep, Mapping):
            raise BudgetError(
                f"min_keep={self.min_keep!r}: one number for all groups is needed here."
            )
        step = np.full(len(widths), self.round_to, dtype=np.int64)
        least = _least([self.min_keep] * len(widths), widths, step)
        return least.tolist(), _most(self.max_keep, widths, least, step).tolist()

    def allow(self, groups: Sequence[Group], counts: np.ndarray) -> np.ndarray:
        """Whether the keep counts of plans are allowed: (plans, groups) -> (plans,) bool."""
        (least, step), most = self.steps(groups), self.most(groups)
        inside = (counts >= least) & (counts <= most)
        allowed = inside & ((counts == most) | ((counts - least) % step == 0))
        if self.drop == "none":
            return allowed.all(1)
        parts = _droppable(groups, self.drop)
        gone = counts == 0
        together = np.array([(gone[:, row].all(1) == gone[:, row].any(1)) for row in parts]).all(0)
        towers = [np.array([g.tower == t for g in groups]) for t in {g.tower for g in groups}]
        something = np.array([~gone[:, row].all(1) for row in towers]).all(0)
        return (allowed | gone).all(1) & together & something

    def _min_keep(self, name: str) -> float:
        if isinstance(self.min_keep, Mapping):
            return self.min_keep.get(name, MIN_KEEP)
        return self.min_keep


def _droppable(groups: Sequence[Group], drop: Drop) -> np.ndarray:
    """(parts, groups) bool: which groups are dropped together."""
    if drop == "blocks":
        return np.eye(len(groups), dtype=bool)
    layers = [(g.tower, g.layer) for g in groups]
    return np.array([[at == layer for at in layers] for layer in dict.fromkeys(layers)])


def _fraction(name: str, value: object) -> float:
    number = finite(value)
    if number is None or not 0 <= number <= 1:
        raise BudgetError(f"{name}={value!r}: a fraction between 0 and 1 is needed.")
    return number


def _least(fractions: Sequence[float], widths: Sequence[int], step: np.ndarray) -> np.ndarray:
    exact = np.array(fractions) * np.array(widths) - 1e-9
    floor = np.maximum(1, np.ceil(exact)).astype(np.int64)
    return np.minimum(-(-floor // step) * step, widths)


def _most(
    fraction: float, widths: Sequence[int], least: np.ndarray, step: np.ndarray
) -> np.ndarray:
    if fraction == 1:
        return np.array(widths, dtype=np.int64)
    whole_units = np.floor(fraction * np.array(widths) + 1e-9).astype(np.int64)
    return np.maximum(least, whole_units // step * step)


Factor = tuple[int, tuple[tuple[int, int], ...]]  # constant, and (group, size of one unit) pairs
Term = tuple[int, tuple[Factor, ...]]  # coefficient and factors


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A cost as an exact function of keep counts: a sum of products.

    A term is `coefficient * factor * factor * ...`; a factor is a constant plus, for every group
    that it depends on, the group's keep count times the size of one unit. So the weight of a
    convolution is one term whose two factors are its output and its input channels.

    Attributes:
        name: what is counted, such as "parameters" or "MACs".
        terms: coefficient and factors of every product; none of the numbers is negative.
    """

    name: str
    terms: tuple[Term, ...]

    @classmethod
    def parameters(cls, groups: Sequence[Group]) -> "Cost":
        """The parameters of `groups`, whose units own their parameters alone."""
        return cls(
            name="parameters",
            terms=tuple((g.unit_parameters, ((0, ((i, 1),)),)) for i, g in enumerate(groups)),
        )

    def __call__(self, keep_counts: Sequence[int] | np.ndarray) -> int:
        """The cost of a plan that keeps `keep_counts[i]` units of group i."""
        return int(self.many(np.asarray(keep_counts, dtype=np.int64)))

    def many(self, keep_counts: np.ndarray) -> np.ndarray:
        """The costs of many plans: keep counts (..., groups) -> (...), both int64."""
        constant, linear, products = self._parts
        total = constant + keep_counts[..., : len(linear)] @ linear
        return total + self._products(keep_counts) if products else total

    def increases(self, keep_counts: np.ndarray, more: np.ndarray) -> np.ndarray:
        """(groups,) what each group alone adds if it keeps `more[i]` further units."""
        _, linear, products = self._parts
        increases = np.zeros_like(more)
        increases[: len(linear)] = linear * more[: len(linear)]
        if products:
            raised = self._products(keep_counts + np.diag(more))
            increases += raised - self._products(keep_counts)
        return increases

    def _products(self, keep_counts: np.ndarray) -> np.ndarray:
        total = np.zeros(keep_counts.shape[:-1], dtype=np.int64)
        for coefficients, factors in self._parts[2]:
            value = coefficients
            for constants, sizes in factors:
                value = value * (constants + keep_counts[..., : len(sizes)] @ sizes)
            total = total + value.sum(-1)
        return total

    @functools.cached_property
    def _parts(self) -> tuple[int, np.ndarray, list[tuple[np.ndarray, list]]]:
        """(constant, linear part, products by number of factors), as arrays for speed."""
        groups = 1 + max((i for _, f in self.terms for _, s in f for i, _ in s), default=-1)
        constant, linear = 0, np.zeros(groups, dtype=np.int64)
        by_length: dict[int, list[Term]] = {}
        for coefficient, factors in self.terms:
            if len(factors) > 1:
                by_length.setdefault(len(factors), []).append((coefficient, factors))
                continue
            fixed, sizes = factors[0] if factors else (1, ())
            constant += coefficient * fixed
            for i, size in sizes:
                linear[i] += coefficient * size
        products = [_stacked(terms, groups) for terms in by_length.values()]
        return constant, linear, products


def _stacked(terms: Sequence[Term], groups: int) -> tuple[np.ndarray, list]:
    """(coefficients (terms,), per factor its constants (terms,) and sizes (groups, terms))."""
    factors = []
    for column in zip(*(f for _, f in terms), strict=True):
        sizes = np.zeros((groups, len(terms)), dtype=np.int64)
        for t, (_, pairs) in enumerate(column):
            for i, size in pairs:
                sizes[i, t] += size
        factors.append((np.array([fixed for fixed, _ in column], dtype=np.int64), sizes))
    return np.array([c for c, _ in terms], dtype=np.int64), factors


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
    nothing, and the rest of the budget goes to groups that keep something.

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
    decoder = _Decoder(groups, bounds, cost)
    target = parameters_left(decoder.total, pruning_ratio)
    if decoder.cost(decoder.smallest) > target:
        raise BudgetError(_unreachable(decoder, pruning_ratio, bounds))
    counts, exact = decoder.counts(logits[None], np.array([target]))
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
    decoder = _Decoder(groups, bounds or Bounds())
    targets = np.array([parameters_left(decoder.total, ratio) for ratio in pruning_ratios.tolist()])
    return decoder.counts(np.asarray(allocations, dtype=np.float64), targets)[0]


class _Decoder:
    """Allocations -> keep counts, one row per plan."""

    def __init__(self, groups: Sequence[Group], bounds: Bounds, cost: Cost | None = None):
        self.groups, self.cost = groups, cost or Cost.parameters(groups)
        self.widths = np.array([g.width for g in groups], dtype=np.int64)
        (self.least, self.step), self.most = bounds.steps(groups), bounds.most(groups)
        self.total = self.cost(self.widths)
        self.parts, self.smallest = None, self.least
        if bounds.drop != "none":
            self.parts = _droppable(groups, bounds.drop)
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
        stays = (stays @ self.parts.T > 0) @ self.parts > 0
        for tower in {g.tower for g in self.groups}:
            of_tower = np.array([g.tower == tower for g in self.groups])
            empty = ~stays[:, of_tower].any(1)
            stays[empty] |= of_tower & (self.smallest > 0)
        return np.where(stays, counts, 0)


def parameters_left(total: int, pruning_ratio: float) -> int:
    """How many of `total` may stay; the rounding error of a ratio costs no parameter."""
    return math.floor((1 - pruning_ratio) * total + 1e-6)


def check_ratio(pruning_ratio: float) -> None:
    """Raise BudgetError unless `pruning_ratio` is a number in [0, 1)."""
    number = finite(pruning_ratio)
    if number is None or not 0 <= number < 1:
        raise BudgetError(
            f"pruning_ratio={pruning_ratio!r}: a number in [0, 1) is needed (fraction removed)."
        )


def max_ratio(groups: Sequence[Group], bounds: Bounds | None = None) -> float:
    """The largest pruning_ratio, in parameters, that `bounds` allow."""
    cost = Cost.parameters(groups)
    smallest = (bounds or Bounds()).smallest(groups)
    return 1 - cost(smallest) / cost([g.width for g in groups])


def largest_ratio(groups: Sequence[Group], bounds: Bounds | None = None) -> float:
    """The largest pruning_ratio that can be requested: `max_ratio` less a margin for rounding."""
    return max(0.0, max_ratio(groups, bounds) - 1e-6)


def _unreachable(decoder: _Decoder, pruning_ratio: float, bounds: Bounds) -> str:
    groups, least = decoder.groups, decoder.smallest
    floors = ", ".join(
        f"{g.name} >= {f} of {g.width}" for g, f in zip(groups[:6], least, strict=False)
    )
    reached = 1 - decoder.cost(least) / decoder.total
    drop = "" if bounds.drop == "none" else f" and drop {bounds.drop}"
    return (
        f"pruning_ratio {pruning_ratio:g} cannot be met with min_keep {bounds.min_keep} and "
        f"round_to {bounds.round_to}{drop}: at most {reached:.4f} can go. "
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
