"""A cost of plans as an exact function of keep counts."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hipp_ext.groups import Group

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
