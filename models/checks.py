"""The rules that fields of all dataclasses share; each raises ValueError in one sentence: object, field, rule, value."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import SupportsIndex, cast

LONGEST_VALUE = 60
"""Characters of a refused value that a message shows."""


def check_name(what: str, name: object) -> None:
    """A text that is not empty."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"a {what} needs a name, a text that is not empty, not {shown(name)}")


def check_number(what: str, field: str, value: object, unit: str, *, zero: bool = False, infinite: bool = True) -> None:
    """A number above 0, or at least 0 if ``zero``; finite unless ``infinite``; one that a double can hold."""
    rule = ("at least 0" if zero else "above 0") + ("" if infinite else " and finite")
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            raise ValueError(f"{what}: {field} must be a number {rule} and below 1.8e308 [{unit}], not {shown(value)}") from None
    if not number >= 0 or (value == 0 and not zero) or (math.isinf(number) and not infinite):
        raise ValueError(f"{what}: {field} must be a number {rule} [{unit}], not {shown(value)}")


def whole(what: str, field: str, value: object, unit: str, *, least: int = 1) -> int:
    """``value`` as an int of at least ``least`` and below 2**62; a float is taken if it is whole."""
    number = value
    if isinstance(value, float) and value.is_integer():
        number = int(value)
    if not isinstance(value, bool) and hasattr(number, "__index__"):
        try:
            number = operator.index(cast(SupportsIndex, number))
        except TypeError:  # an array has __index__, too, and refuses unless it is a single number
            number = None
        if number is not None and least <= number < 2**62:
            return number
    raise ValueError(f"{what}: {field} must be a whole number of {unit}, at least {least} and below 2**62, not {shown(value)}")


def wholes(what: str, field: str, values: object, unit: str, *, least: int = 1) -> tuple[int, ...]:
    """``values`` as a tuple of whole numbers (see ``whole``)."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"{what}: {field} must be several whole numbers of {unit}, as in ({least}, {least + 1}), not {shown(values)}")
    try:
        listed = tuple(values)
    except TypeError:  # an array without a dimension
        raise ValueError(f"{what}: {field} must be several whole numbers of {unit}, not {shown(values)}; put it into a list") from None
    return tuple(whole(what, field, value, unit, least=least) for value in listed)


def shown(value: object) -> str:
    """``repr`` on one line, cut where it is long; numbers of NumPy as plain ones."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an int of more digits than Python writes
        return "a whole number of thousands of digits"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
