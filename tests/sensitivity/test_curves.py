"""What a curve of a group takes from an estimate and from measurements."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hipp_ext.sensitivity.anchors import MEASURED_LEVELS
from hipp_ext.sensitivity.curves import (
    ANCHOR_LEVEL,
    FLOOR,
    LEVELS,
    NARROW,
    at_levels,
    loss_curve,
    units_at,
)

LOSSES = st.floats(0, 100, allow_subnormal=False)
NARROW_WIDTHS, WIDE_WIDTHS = st.integers(1, NARROW), st.integers(NARROW + 1, 50)


def drawn(data, widths, levels):
    """An estimate, and measurements at the levels."""
    width = data.draw(widths)
    values = data.draw(st.lists(LOSSES, min_size=width, max_size=width))
    points = sorted({units_at(level, width) for level in levels})
    measured = {k: data.draw(LOSSES) for k in points}
    return torch.tensor([0.0, *values], dtype=torch.float64), measured


@pytest.mark.parametrize("width", [1, 3, 44])
def test_levels_are_interpolated_between_units(width):
    units = torch.arange(width + 1, dtype=torch.float64)
    assert at_levels(units).tolist() == pytest.approx([width * level for level in LEVELS])
    bent = torch.stack([units, units.square()])
    exact = [
        (1 - width * level % 1) * math.floor(width * level) ** 2
        + width * level % 1 * math.ceil(width * level) ** 2
        for level in LEVELS
    ]
    assert at_levels(bent)[1].tolist() == pytest.approx(exact)


@settings(deadline=None)
@given(st.sampled_from([*LEVELS, 0.01]), st.integers(1, 300))
def test_a_level_is_a_number_of_units_of_the_group(level, width):
    assert 1 <= units_at(level, width) <= width
    assert abs(units_at(level, width) - level * width) <= max(0.5, 1 - level * width)


@settings(deadline=None)
@given(st.data())
def test_a_wide_group_grows_with_the_square_through_its_anchor(data):
    estimate, measured = drawn(data, WIDE_WIDTHS, (ANCHOR_LEVEL, 1.0))
    width = len(estimate) - 1
    anchor = units_at(ANCHOR_LEVEL, width)
    for found, size in ((measured, measured[anchor]), ({}, float(estimate[anchor]))):
        curve = loss_curve(estimate, found)
        for k in range(anchor + 1):
            expected = max(size, FLOOR) * (k / anchor) ** 2
            assert float(curve[k]) == pytest.approx(expected, rel=1e-6, abs=0)
    last = float(loss_curve(estimate, measured)[width])
    assert last == pytest.approx(max(measured[width], FLOOR))


@settings(deadline=None)
@given(st.data())
def test_without_measurements_a_wide_group_grows_up_to_its_last_unit(data):
    estimate, _ = drawn(data, WIDE_WIDTHS, ())
    curve = loss_curve(estimate, {})
    assert curve[0] == 0 and (curve.diff() > 0).all()
    assert float(curve[-1]) >= float(estimate[-1])


@settings(deadline=None)
@given(st.data())
def test_a_wide_group_grows_where_its_measurements_do(data):
    """Up to the last unit, whose value is its own; elsewhere the curve may fall as they do."""
    estimate, measured = drawn(data, WIDE_WIDTHS, MEASURED_LEVELS)
    *inner, _ = sorted(measured)
    growing = dict(zip(inner, sorted(measured.values()), strict=False))
    values = loss_curve(estimate, growing)[inner]
    assert (values.diff() >= -1e-9 * values[1:]).all()


@settings(deadline=None)
@given(st.data(), st.sampled_from([NARROW_WIDTHS, WIDE_WIDTHS]))
def test_a_group_has_its_measured_values(data, widths):
    estimate, measured = drawn(data, widths, MEASURED_LEVELS)
    curve = loss_curve(estimate, measured)
    assert curve[0] == 0
    for k, value in measured.items():
        assert float(curve[k]) == pytest.approx(max(value, FLOOR), rel=1e-6, abs=FLOOR)


def test_a_narrow_group_follows_its_estimate_between_measurements():
    estimate = torch.tensor([0, 1, 4, 9, 16.0])
    assert loss_curve(estimate, {}).tolist() == estimate.tolist()
    assert loss_curve(estimate, {1: 2.0}).tolist() == pytest.approx([0, 2, 8, 18, 32])
    # between the factors 2 and 8 it is their geometric mean, and beyond 3 units it stays
    joined = loss_curve(estimate, {1: 2.0, 3: 72.0})
    assert joined.tolist() == pytest.approx([0, 2, 16, 72, 128])
    assert loss_curve(estimate, {1: 2.0, 4: 32.0}).tolist() == pytest.approx([0, 2, 8, 18, 32])


@pytest.mark.parametrize("width", [1, 2, NARROW, NARROW + 1, 44])
def test_zeros_stay_finite_and_almost_zero(width):
    """A unit that no position reads, and a measurement below the noise of float32."""
    nothing = torch.zeros(width + 1)
    for measured in (
        {},
        dict.fromkeys((units_at(level, width) for level in (ANCHOR_LEVEL, 1.0)), 0.0),
    ):
        curve = loss_curve(nothing, measured)
        assert torch.isfinite(curve).all()
        assert float(curve.min()) >= 0 and float(curve.max()) <= FLOOR * width**2


def test_an_estimate_of_zero_does_not_hide_a_measured_loss():
    narrow = loss_curve(torch.zeros(5), {1: 0.1, 4: 0.3})
    assert narrow[[1, 4]].tolist() == pytest.approx([0.1, 0.3])
    wide = loss_curve(torch.zeros(41), {10: 0.1, 20: 0.2, 40: 0.3})
    assert wide[[20, 40]].tolist() == pytest.approx([0.2, 0.3])
