"""Whether what was made from some tensors still serves: told from which tensors they are, and how often written to."""

from __future__ import annotations

import operator
from typing import Any

import torch


def versions(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    """How often each tensor was written to; 0 for None and where it does not tell: in inference mode, and while it is
    traced."""
    if torch.compiler.is_compiling():
        return (0,) * len(tensors)
    return tuple([0 if one is None or one.is_inference() else one._version for one in tensors])


def unchanged(known: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    """Whether something made from the tensors, versions and devices ``known`` still serves."""
    if len(known) != len(now):
        return False
    # Nearly always they are the same objects, which takes a tenth of the time to find out.
    return all(map(operator.is_, known, now)) or all(
        old is new or (isinstance(old, (int, torch.device, torch.dtype)) and old == new)
        for old, new in zip(known, now, strict=True)
    )


def counting_writes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy of one that was made in inference mode, which would not tell who writes to it."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()
