"""Numbers given as options, whatever type they came in: taken where exact, refused in words where not."""

from typing import Any

from hipp_ext.errors import CompressionError
from hipp_ext.quantities import finite, whole


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int: of Python, numpy or torch, or a float such as 8.0 that is one.

    Raises:
        CompressionError: it is a truth value, a string, not a whole number, or out of range.
    """
    number = whole(_plain(value))
    if number is None or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise CompressionError(f"{name}={value!r}: a whole number {bounds} is needed.")
    return number


def positive_number(name: str, value: Any) -> float:
    """`value` as a float.

    Raises:
        CompressionError: it is a truth value, a string, not finite, not above 0, or not exact as a float.
    """
    plain = _plain(value)
    number = finite(plain)
    if number is None or number <= 0 or number != plain:
        raise CompressionError(f"{name}={value!r}: a finite number above 0 is needed.")
    return number


def _plain(value: Any) -> Any:
    """The Python number in a scalar of numpy or torch."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
