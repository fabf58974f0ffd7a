import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipp_ext import Preference
from hipp_ext.errors import PreferenceError

component = st.floats(0, 1e308, allow_nan=False)


@given(component, component, component)
def test_a_preference_lies_on_the_simplex(u, r, c):
    if u == r == c == 0:
        with pytest.raises(PreferenceError, match="wants nothing"):
            Preference(u, r, c)
        return
    point = Preference(u, r, c).as_tuple()
    assert math.isclose(sum(point), 1, rel_tol=1e-9) and all(0 <= x <= 1 for x in point)


def test_only_proportions_count():
    assert Preference(4, 4, 2).as_tuple() == pytest.approx((0.4, 0.4, 0.2))
    assert Preference(4, 4, 2) == Preference(utility=0.4 * 1, robustness=0.4, compression=0.2)


@pytest.mark.parametrize(
    "bad", [-0.1, float("nan"), float("inf"), "0.4", None, True, 10**400, 1j, np.array([0.4])]
)
def test_components_must_be_finite_and_not_negative(bad):
    with pytest.raises(PreferenceError, match=r"Preference\(robustness="):
        Preference(0.4, bad, 0.2)


def test_a_preference_is_frozen():
    with pytest.raises(AttributeError):
        Preference(1, 1, 1).utility = 0.5


def test_numbers_of_other_types_are_taken():
    assert Preference(np.float32(0.25), np.int64(0), Fraction(3, 4)) == Preference(0.25, 0, 0.75)
