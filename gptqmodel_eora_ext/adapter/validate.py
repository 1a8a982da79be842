"""Checks of single values, with messages that tell what was found and what was expected."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any


def validate_rank(rank: Any, *, what: str = "EoRA: `rank`", minimum: int = 1) -> int:
    """Return ``rank`` as an int.

    Raises:
        ValueError: when it is not an integer or below ``minimum``; the message tells what was found.
    """
    return validate_count(rank, what=what, minimum=minimum, hint=" Usual ranks are 16 to 256.")


def validate_count(value: Any, *, what: str, minimum: int = 1, hint: str = "") -> int:
    """Return ``value`` as an int.

    Raises:
        ValueError: when it is not an integer or below ``minimum``; the message tells what was found, and ``hint``.
    """
    if isinstance(value, bool):
        raise ValueError(f"{what} must be an integer, got {value!r}.")
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{what} must be an integer, got {value!r} ({type(value).__name__}).") from None
    if count < minimum:
        raise ValueError(f"{what} must be at least {minimum}, got {count}.{hint}")
    return count


def validate_choice(value: Any, choices: Iterable[Any], *, what: str) -> Any:
    """Return ``value``.

    Raises:
        ValueError: when it is none of ``choices``; the message lists them.
    """
    choices = tuple(choices)
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(map(str, choices))}, got {value!r}.")
    return value
