"""Budgets of bytes, as users write them, and what factors weigh."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .solve import GROUP_SIZE

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
SCALE_BYTES = 2
FORM = '"300MB", "0.25bpw" (bits per quantised weight) or "r32" (what a 16-bit rank 32 takes)'


@dataclass(frozen=True)
class ModuleShape:
    """A module to compensate."""

    name: str
    out_features: int
    in_features: int

    @property
    def weights(self) -> int:
        """Quantised weights."""
        return self.out_features * self.in_features


def factor_bytes(rank: int, shape: ModuleShape, factor_bits: int) -> int:
    """Bytes of both factors as they are stored, scales included."""
    if factor_bits == 16:
        return 2 * rank * (shape.in_features + shape.out_features)
    row = sum(
        -(-features * factor_bits // 8) + SCALE_BYTES * -(-features // GROUP_SIZE)
        for features in (shape.in_features, shape.out_features)
    )
    return rank * row


def uniform_rank(nbytes: int, shapes: Iterable[ModuleShape], factor_bits: int) -> int:
    """The largest rank for all modules whose factors take no more than so many bytes; 0 where none does."""
    return max(nbytes, 0) // sum(factor_bytes(1, shape, factor_bits) for shape in shapes)


def weight_bytes(shape: ModuleShape, bits: int, group_size: int) -> int:
    """Bytes of a module's weights in the GPTQ format: codes, float16 scales, zeros as wide as codes."""
    groups = 1 if group_size == -1 else -(-shape.in_features // group_size)
    return (shape.weights * bits + groups * shape.out_features * (8 * SCALE_BYTES + bits)) // 8


def budget_bytes(budget: Any, shapes: Iterable[ModuleShape]) -> int:
    """Return a budget in bytes.

    Args:
        budget: bytes, or a string in one of the forms of `FORM`.
        shapes: the modules that share it.

    Raises:
        ValueError: for any other form, or a budget that is not positive.
    """
    shapes = list(shapes)
    value: float = -1
    if isinstance(budget, int) and not isinstance(budget, bool):
        value = budget
    elif isinstance(budget, str):
        found = re.fullmatch(r"\s*(r?)\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", budget.lower())
        if found:
            by_rank, number, unit = found[1], float(found[2]), found[3]
            if by_rank and not unit and number == int(number):
                value = sum(factor_bytes(int(number), shape, 16) for shape in shapes)
            elif not by_rank and unit == "bpw":
                value = number * sum(shape.weights for shape in shapes) / 8
            elif not by_rank and unit in UNITS:
                value = number * UNITS[unit]
    if value <= 0:
        raise ValueError(f"EoRA: `budget` must be a positive number of bytes, {FORM}, got {budget!r}.")
    return int(value)
