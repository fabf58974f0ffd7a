"""Plans in which all layers are alike: one number of heads and one FFN width for a whole tower."""

import itertools
from collections.abc import Sequence

import numpy as np

from hipp_ext.budget.bounds import Bounds
from hipp_ext.budget.cost import Cost
from hipp_ext.groups import Group

CHUNK = 256  # plans that are decoded at once
LEAST_FRACTION = 0.002  # of a group, and of what is removed of it: logits of 0 and 1 are infinite


def uniform_plans(
    groups: Sequence[Group], target: int, bounds: Bounds, cost: Cost | None = None
) -> np.ndarray:
    """(plans, groups) keep counts of all uniform plans that fit `target` and cannot keep more.

    No part of such a plan can keep its next allowed count within the target.

    Args:
        groups: from `find_groups`.
        target: largest cost.
        bounds: which counts are allowed; their shape is not looked at.
        cost: what the target counts; None: parameters.
    """
    candidates, fits = _candidates(groups, np.array([target]), bounds, cost)
    return candidates[0, fits[0]]


def uniform_counts(
    groups: Sequence[Group],
    logits: np.ndarray,
    targets: np.ndarray,
    bounds: Bounds,
    cost: Cost | None = None,
) -> np.ndarray:
    """(plans, groups) keep counts of the uniform plans nearest to allocations, see `distances`.

    Where not even the smallest plan fits its target, it is returned.

    Args:
        groups: from `find_groups`.
        logits: (plans, groups) allocations.
        targets: (plans,) largest costs.
        bounds: which counts are allowed.
        cost: what the targets count; None: parameters.
    """
    found = []
    for start in range(0, len(logits), CHUNK):
        rows = slice(start, start + CHUNK)
        candidates, fits = _candidates(groups, targets[rows], bounds, cost)
        far = np.where(fits, distances(groups, candidates, logits[rows, None]), np.inf)
        nearest = np.take_along_axis(candidates, far.argmin(1)[:, None, None], 1)[:, 0]
        found.append(np.where(fits.any(1, keepdims=True), nearest, bounds.smallest(groups)))
    return np.concatenate(found)


def distances(groups: Sequence[Group], counts: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """How far plans are from allocations: (..., groups) and (..., groups) -> (...).

    The variance, weighted by parameters, of the difference between the logits of the fractions that
    stay and those of the allocation. So only differences of an allocation count.
    """
    fractions = counts / np.array([g.width for g in groups])
    fractions = np.clip(fractions, LEAST_FRACTION, 1 - LEAST_FRACTION)
    weights = np.array([g.parameters for g in groups], dtype=np.float64)
    weights /= weights.sum()
    difference = np.log(fractions / (1 - fractions)) - logits
    mean = (difference * weights).sum(-1, keepdims=True)
    return (np.square(difference - mean) * weights).sum(-1)


def _candidates(
    groups: Sequence[Group], targets: np.ndarray, bounds: Bounds, cost: Cost | None
) -> tuple[np.ndarray, np.ndarray]:
    """((targets, combinations, groups) keep counts, (targets, combinations) which are plans).

    A combination fixes the counts of all parts but the one with most choices, which then keeps as
    much as fits.
    """
    cost = cost or Cost.parameters(groups)
    *others, last = sorted(bounds.uniform_parts(groups), key=lambda part: len(part.counts))
    combinations = np.array(list(itertools.product(*(part.counts for part in others))))
    combinations = combinations.reshape(-1, len(others))
    plans = np.zeros((len(targets), len(combinations), len(groups)), dtype=np.int64)
    for column, part in enumerate(others):
        plans[..., part.members] = combinations[:, column, None]

    def with_last(index: np.ndarray) -> np.ndarray:
        plans[..., last.members] = last.counts[index][..., None]
        return plans

    low = np.full(plans.shape[:2], -1)  # the largest index that fits; -1: none does
    high = np.full(plans.shape[:2], len(last.counts) - 1)
    while (low < high).any():
        middle = (low + high + 1) // 2
        fits = cost.many(with_last(middle)) <= targets[:, None]
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return with_last(np.maximum(low, 0)), (low >= 0) & ~_dominated(combinations, low)


def _dominated(combinations: np.ndarray, last: np.ndarray) -> np.ndarray:
    """(targets, combinations) bool: whether another combination keeps more and nothing less."""
    more = (combinations[None] >= combinations[:, None]).all(-1)
    more &= (combinations[None] > combinations[:, None]).any(-1)  # (one, another)
    return np.asarray((more & (last[:, None, :] >= last[:, :, None])).any(-1))
