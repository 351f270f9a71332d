"""Checks of single settings. The errors say what was expected and what came."""

from __future__ import annotations

import math
from typing import Any, get_args


def check_ridge(ridge: Any) -> None:
    """Check the ridge.

    Raises:
        ValueError: if it is neither "auto" nor a positive number.
    """
    number = isinstance(ridge, int | float) and not isinstance(ridge, bool)
    if ridge != "auto" and not (number and 0 < ridge < math.inf):
        raise ValueError(
            f"ridge must be 'auto' or a positive number, a share of the largest eigenvalue, but it is {ridge!r}"
        )


def is_count(value: object) -> bool:
    """Whether a value is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_scale(scale: float) -> float:
    """Check the scale of a step, its length and sign.

    Raises:
        ValueError: if it is 0 or not finite.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < math.inf or scale == 0:
        raise ValueError(f"scale must be a finite number other than 0, but it is {scale!r}")
    return float(scale)


def check_choice(name: str, value: object, choices: Any) -> None:
    """Check that a value is one of the choices, a Literal.

    Raises:
        ValueError: if it is not.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, but it is {value!r}")


def check_integer(name: str, value: object, least: int) -> None:
    """Check that a value is a whole number of at least `least`.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but it is {value!r}")


def check_positive(name: str, value: object) -> None:
    """Check that a value is a positive, finite number.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive, finite number, but it is {value!r}")
