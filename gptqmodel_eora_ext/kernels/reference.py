"""The oracle: y = x Ŵᵀ + ((x Aᵀ) ∘ g) Bᵀ + bias in plain torch, on any device, differentiable by x, A, B and bias."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..formats.factors import Factors
from ..formats.packed_weights import PackedWeight


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Ŵ, out × in. The products scale · (code − zero) are taken in ``dtype``."""
    group = weight.group_of_input()
    steps = (weight.codes() - weight.zeros()[group]).to(dtype)
    return (weight.scales.to(dtype)[group] * steps).T.contiguous()


def parts_of(members: Sequence[int]) -> list[slice]:
    """Which components are each member's."""
    ends = list(itertools.accumulate(members))
    return [slice(end - rank, end) for end, rank in zip(ends, members, strict=True)]


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    factors: Factors | None = None,
    bias: torch.Tensor | None = None,
    *,
    weights: torch.Tensor | None = None,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """y = x Ŵᵀ + ((x Aᵀ) ∘ g) Bᵀ + bias, where g gives all components of a member the row's weight of that member.

    Args:
        x: … × in.
        weight: Ŵ.
        factors: A and B; None for none.
        bias: of length out.
        weights: … × members of ``factors``, one row for each row of x; None weighs all components by 1. Weights that
            are 0 leave a member out, whatever its factors hold.
        accumulate: dtype of every operand and sum; the result alone is rounded, to x's dtype.

    Returns:
        … × out, in x's dtype.
    """
    inputs = x.to(accumulate)
    y = inputs @ dequantize(weight, accumulate).T
    if factors is not None:
        factors.check(weight)
        down, up = factors.dense(accumulate)
        if weights is None:
            y = y + (inputs @ down.T) @ up
        else:
            for member, part in enumerate(parts_of(factors.members)):
                own = weights[..., member : member + 1].to(accumulate)
                if bool((own != 0).any()):
                    y = y + (inputs @ down[part].T * own) @ up[part]
    if bias is not None:
        y = y + bias.to(accumulate)
    return y.to(x.dtype)
