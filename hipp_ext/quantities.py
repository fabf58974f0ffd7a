"""Numbers from users: exact values of any numeric type are accepted, everything else is refused."""

import math
from numbers import Integral, Real
from typing import Any


def whole(value: Any) -> int | None:
    """`value` as an int, or None. 2, 2.0 and numpy's 2 give 2; True, "2" and 1.5 give None."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if isinstance(value, Integral):
        return int(value)
    number = finite(value)
    return int(number) if number is not None and number == value and number.is_integer() else None


def finite(value: Any) -> float | None:
    """`value` as a finite float, or None. numpy's numbers count; True and "0.3" do not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        return None
    return number if math.isfinite(number) else None


def whole_option(
    name: str, value: Any, error: type[Exception], least: int, most: int | None = None
) -> int:
    """The option `value` as an int from `least` to `most`; scalars of numpy and torch count.

    Raises:
        error: `value` is not a whole number, or is out of range.
    """
    number = whole(_scalar(value))
    if number is None or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise error(f"{name}={value!r}: a whole number {bounds} is needed.")
    return number


def finite_option(
    name: str, value: Any, error: type[Exception], *, zero: bool = False, below: float = math.inf
) -> float:
    """The option `value` as a float above 0, or of at least 0; scalars of numpy and torch count.

    Args:
        name: name of the option.
        value: what was given.
        error: type of the error.
        zero: whether 0 is allowed.
        below: what the value must be below.

    Raises:
        error: `value` is not a finite number, or is out of range.
    """
    number = finite(_scalar(value))
    if number is None or number < 0 or (number == 0 and not zero) or number >= below:
        bounds = "of at least 0" if zero else "above 0"
        bounds += f" and below {below:g}" if below < math.inf else ""
        raise error(f"{name}={value!r}: a finite number {bounds} is needed.")
    return number


def take_numbers(
    holder: Any,
    error: type[Exception],
    *,
    wholes: tuple[str, ...] = (),
    finites: tuple[str, ...] = (),
) -> None:
    """Convert attributes of `holder` to int and float in place.

    Args:
        holder: an object with these attributes; it may be a frozen dataclass.
        error: type of the error for an attribute that is not a number of its kind.
        wholes, finites: names of the attributes that `whole` and `finite` read.
    """
    kinds: tuple[Any, ...] = (("whole", whole, wholes), ("finite", finite, finites))
    for kind, read, names in kinds:
        for name in names:
            value = getattr(holder, name)
            if (number := read(value)) is None:
                raise error(f"{name}={value!r}: a {kind} number is needed.")
            object.__setattr__(holder, name, number)


def _scalar(value: Any) -> Any:
    """The Python number in a 0-dim array or tensor."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
