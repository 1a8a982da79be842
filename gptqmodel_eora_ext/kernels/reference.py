"""The oracle: y = x Ŵᵀ + (x Aᵀ) Bᵀ + bias in plain torch, on any device, differentiable by x, A, B and bias."""

from __future__ import annotations

import torch

from ..formats.factors import Factors
from ..formats.packed_weights import PackedWeight


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Ŵ, out × in. The products scale · (code − zero) are taken in ``dtype``."""
    group = weight.group_of_input()
    steps = (weight.codes() - weight.zeros()[group]).to(dtype)
    return (weight.scales.to(dtype)[group] * steps).T.contiguous()


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    factors: Factors | None = None,
    bias: torch.Tensor | None = None,
    *,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """y = x Ŵᵀ + (x Aᵀ) Bᵀ + bias.

    Args:
        x: … × in.
        weight: Ŵ.
        factors: A and B; None for none.
        bias: of length out.
        accumulate: dtype of every operand and sum; the result alone is rounded, to x's dtype.

    Returns:
        … × out, in x's dtype.
    """
    inputs = x.to(accumulate)
    y = inputs @ dequantize(weight, accumulate).T
    if factors is not None:
        factors.check(weight)
        down, up = factors.dense(accumulate)
        y = y + (inputs @ down.T) @ up
    if bias is not None:
        y = y + bias.to(accumulate)
    return y.to(x.dtype)
