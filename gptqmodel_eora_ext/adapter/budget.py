"""Budgets of bytes, as users write them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..formats.factors import PACKED_LAYOUT, FactorLayout
from ..formats.sizes import ModuleShape, factor_bytes

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
# Units of a budget that are not bytes: bits per quantised weight, and the bytes of a 16-bit adapter of that rank.
BITS_PER_WEIGHT = "bpw"
BY_RANK = "r"
FORM = '"300MB", "0.25bpw" (bits per quantised weight) or "r32" (what a 16-bit rank 32 takes)'


def parse_budget(budget: Any, *, what: str = "EoRA: `budget`") -> tuple[float, str]:
    """A budget as a number and its unit: "b", `BITS_PER_WEIGHT` or `BY_RANK`.

    Args:
        budget: bytes, or a string in one of the forms of `FORM`.
        what: names the budget in a message.

    Raises:
        ValueError: for any other form, or a budget that is not positive.
    """
    value, unit = -1.0, "b"
    if isinstance(budget, int) and not isinstance(budget, bool):
        value = budget
    elif isinstance(budget, str):
        found = re.fullmatch(r"\s*(r?)\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", budget.lower())
        if found:
            by_rank, number, suffix = found[1], float(found[2]), found[3]
            if by_rank and not suffix and number == int(number):
                value, unit = number, BY_RANK
            elif not by_rank and suffix == BITS_PER_WEIGHT:
                value, unit = number, BITS_PER_WEIGHT
            elif not by_rank and suffix in UNITS:
                value = number * UNITS[suffix]
    if value <= 0:
        raise ValueError(f"{what} must be a positive number of bytes, {FORM}, got {budget!r}.")
    return value, unit


def budget_bytes(budget: Any, shapes: Iterable[ModuleShape]) -> int:
    """Return a budget in bytes.

    Args:
        budget: bytes, or a string in one of the forms of `FORM`.
        shapes: the modules that share it.

    Raises:
        ValueError: for any other form, or a budget that is not positive.
    """
    value, unit = parse_budget(budget)
    if unit == BITS_PER_WEIGHT:
        return int(value * sum(shape.weights for shape in shapes) / 8)
    if unit == BY_RANK:
        return sum(factor_bytes(int(value), shape, 16) for shape in shapes)
    return int(value)


def largest_uniform_rank(
    nbytes: int, shapes: Iterable[ModuleShape], factor_bits: int, layout: FactorLayout = PACKED_LAYOUT
) -> int:
    """The largest rank for all modules whose factors take no more than so many bytes; 0 where none does."""
    multiple = layout.multiple if factor_bits < 16 else 1
    return multiple * (max(nbytes, 0) // sum(factor_bytes(multiple, shape, factor_bits, layout) for shape in shapes))
