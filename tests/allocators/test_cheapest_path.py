"""The path of cheapest allocations, against a linear program."""

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from hipp_ext.sensitivity.cheapest_path import CheapestPath

LEVELS = (0.25, 0.5, 0.9)
COSTS = st.lists(st.integers(1, 10**6), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(COSTS, st.randoms(use_true_random=False), st.floats(0, 0.9))
@example([1, 8387, 1], Random(0), 0.9)
def test_no_allocation_of_convex_curves_loses_less(parameters, random, ratio):
    slopes = np.sort([[random.random() for _ in LEVELS] for _ in parameters], 1)
    steps = np.diff([0.0, *LEVELS])
    losses = (slopes * steps).cumsum(1)
    # In double precision: one part in ten millions of all parameters can be a whole small group.
    ratios = torch.tensor([ratio], dtype=torch.float64)
    shares = (
        CheapestPath(parameters, LEVELS, torch.tensor(losses))
        .keep_fractions(ratios)[0]
        .double()
        .numpy()
    )
    weights = np.array(parameters) / sum(parameters)
    assert (1 - shares) @ weights == pytest.approx(ratio, abs=1e-5)
    lost = sum(
        np.interp(1 - s, [0, *LEVELS], [0, *curve]) for s, curve in zip(shares, losses, strict=True)
    )
    best = linprog(
        slopes.ravel(),
        A_eq=np.repeat(weights, len(LEVELS))[None],
        b_eq=[ratio],
        bounds=[(0, step) for _ in parameters for step in steps],
    )
    assert lost == pytest.approx(best.fun, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(COSTS, st.randoms(use_true_random=False))
def test_shares_never_rise_with_the_ratio(parameters, random):
    losses = torch.tensor(
        [[random.random() for _ in LEVELS] for _ in parameters]
    )  # of any shape, noise say
    shares = CheapestPath(parameters, LEVELS, losses).keep_fractions(torch.linspace(0, 1, 50))
    assert shares[0].tolist() == [1] * len(parameters) and (shares.diff(dim=0) < 1e-6).all()
    assert shares[-1].tolist() == pytest.approx([0.1] * len(parameters))


def test_a_dent_in_a_curve_is_bridged():
    """The second group is worth nothing until it is nearly gone: it goes first, and whole steps of
    it.
    """
    path = CheapestPath([100, 100], LEVELS, torch.tensor([[0.1, 0.3, 1.0], [0.0, 0.0, 0.02]]))
    assert path.keep_fractions(torch.tensor([0.25, 0.45, 0.5])).tolist() == [
        pytest.approx([1.0, 0.5]),
        pytest.approx([1.0, 0.1]),
        pytest.approx([0.9, 0.1]),
    ]
    bumpy = CheapestPath([100, 100], LEVELS, torch.tensor([[0.5, 0.5, 0.6], [0.2, 0.4, 0.8]]))
    assert bumpy.keep_fractions(torch.tensor([0.45]))[0].tolist() == pytest.approx([0.1, 1.0])
