"""Ŵ and the factors as dense matrices: for so many rows that the vendor's matrix product outruns fused tiles."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .codes import load_factor
from .gemm import weight_tile


@triton.jit
def dequantize_kernel(
    dense, qweight, qzeros, scales, g_idx, in_features, columns,
    BITS: tl.constexpr, CODES: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Ŵᵀ, in × columns, rounded once. Grid: tiles of outputs × tiles of inputs."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_K
    in_n = n < columns
    weight = weight_tile(qweight, qzeros, scales, g_idx, start, n, in_n, in_features, columns,
                         BITS, CODES, GROUP_SIZE, BLOCK_N, BLOCK_K)  # fmt: skip
    k = start + tl.arange(0, BLOCK_K)
    place = dense + k.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(place, weight.to(dense.dtype.element_ty), mask=(k < in_features)[:, None] & in_n[None, :])


@triton.jit
def factor_kernel(
    dense, codes, scales, columns,
    FACTOR_BITS: tl.constexpr, FACTOR_GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A factor's values, rows × columns, rounded once. Grid: tiles of columns × rows."""
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = column < columns
    values = load_factor(codes, scales, row, column, live, columns, FACTOR_BITS, FACTOR_GROUP)
    tl.store(dense + row * columns + column, values.to(dense.dtype.element_ty), mask=live)
