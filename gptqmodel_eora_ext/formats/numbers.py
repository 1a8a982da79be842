"""Numbers that a file tells, checked before anything is done with them."""

from __future__ import annotations

# Python reads integers of any length from JSON; none that a checkpoint or an adapter means is beyond 64 bits.
LARGEST_INTEGER = 2**63 - 1


def is_whole(value: object, least: int = 1) -> bool:
    """Whether a value is an integer of at least ``least``; JSON may hold a float, a text, or true and false instead."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST_INTEGER
