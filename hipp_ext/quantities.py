"""Numbers that a user gives: what is exactly one is taken, whoever's type it has, and nothing else is."""

import math
from numbers import Integral, Real
from typing import Any


def whole(value: Any) -> int | None:
    """`value` as an int; None if it is no whole number. 2, 2.0 and numpy's 2 are 2; True, "2" and 1.5 are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if isinstance(value, Integral):
        return int(value)
    number = finite(value)
    return int(number) if number is not None and number == value and number.is_integer() else None


def finite(value: Any) -> float | None:
    """`value` as a float; None if it is no finite number. numpy's numbers and fractions are; True and "0.3" are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return None
    return number if math.isfinite(number) else None
