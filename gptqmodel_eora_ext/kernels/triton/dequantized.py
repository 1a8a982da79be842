"""Ŵᵀ as a dense matrix on a GPU, in one launch."""

from __future__ import annotations

import torch

from ..devices import on
from . import settings
from .dense import dequantize_kernel


def dequantized(
    qweight: torch.Tensor,
    qzeros: torch.Tensor | None,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    *,
    in_features: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Ŵᵀ, in × out, in ``dtype``; tensors as `ops.StackedLinears` has them."""
    out = qweight.shape[1]
    block_k = settings.tile_inputs(bits, group_size, in_features) if g_idx is None else 0
    chosen = settings.dequantize(block_k)
    weight = qweight.new_empty(in_features, out, dtype=dtype)
    with on(qweight.device):
        dequantize_kernel[(-(-out // chosen.block_n), -(-in_features // chosen.block_k))](
            weight, qweight, qzeros, scales, g_idx, in_features, out, BITS=bits, CODES=settings.unit_codes(bits),
            GROUP_SIZE=group_size, BLOCK_N=chosen.block_n, BLOCK_K=chosen.block_k, **chosen.options(),
        )  # fmt: skip
    return weight
