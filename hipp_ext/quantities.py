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


def take_numbers(
    holder: Any,
    error: type[Exception],
    *,
    wholes: tuple[str, ...] = (),
    finites: tuple[str, ...] = (),
) -> None:
    """Turn attributes of `holder`, a frozen dataclass perhaps, into plain numbers.

    Args:
        holder: an object with these attributes.
        error: raised where one of them is no number of its kind.
        wholes, finites: names of the attributes that are read by `whole` and by `finite`.
    """
    kinds: tuple[Any, ...] = (("whole", whole, wholes), ("finite", finite, finites))
    for kind, read, names in kinds:
        for name in names:
            value = getattr(holder, name)
            if (number := read(value)) is None:
                raise error(f"{name}={value!r}: a {kind} number is needed.")
            object.__setattr__(holder, name, number)
