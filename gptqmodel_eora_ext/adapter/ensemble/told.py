"""Weights of members as somebody tells them, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import AdapterError
from .folder import SHARED, unknown_member

# Weights for one sequence: member → weight; {} for the shared adapter alone, None to let the router choose.
Told = Mapping[str, float] | None
FORM = 'weights like {"math": 1.0}, a list of such for each prompt, or None for the router to choose'
# Weights that somebody divided by their sum may add up to a rounding more than 1.
ROUNDING = 1e-6


def told_weights(weights: Told | Sequence[Told], members: Sequence[str], sequences: int) -> list[list[float] | None]:
    """Rows of weights, in the order of ``members``; None for a row that the router is to choose.

    Args:
        weights: for all sequences alike, or one entry for each.
        members: names, without the shared adapter's, whose weight is always 1.
        sequences: in the batch.

    Raises:
        AdapterError: for another form, an unknown member, and weights that are negative, NaN or sum to above 1.
    """
    if weights is None or isinstance(weights, Mapping):
        return [_row(weights, members, "")] * sequences
    if isinstance(weights, (str, bytes)) or not isinstance(weights, Sequence):
        raise AdapterError(f"Ensemble: weights are {weights!r}; expected {FORM}.")
    if len(weights) != sequences:
        raise AdapterError(f"Ensemble: {len(weights)} rows of weights for {sequences} prompts; expected one for each, "
                           f"or one mapping for all.")  # fmt: skip
    return [_row(one, members, f" of prompt {index}") for index, one in enumerate(weights)]


def _row(weights: Any, members: Sequence[str], of: str) -> list[float] | None:
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise AdapterError(f"Ensemble: the weights{of} are {weights!r}; expected {FORM}.")
    for name, value in weights.items():
        if name == SHARED:
            raise AdapterError(f"Ensemble: the weights{of} name {SHARED!r}, whose weight is always 1. Leave it out.")
        if name not in members:
            raise AdapterError(unknown_member(str(name), members))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise AdapterError(f"Ensemble: the weight of {name}{of} is {value!r}; expected a number from 0 to 1.")
    total = sum(weights.values())
    if total > 1 + ROUNDING:
        raise AdapterError(f"Ensemble: the weights{of} sum to {total:g}; expected at most 1.")
    return [float(weights.get(name, 0.0)) for name in members]
