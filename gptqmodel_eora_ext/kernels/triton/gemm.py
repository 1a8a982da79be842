"""y = x Ŵᵀ + t Bᵀ + bias by tiles on tensor cores: from a handful of rows to a prompt.

Each program takes BLOCK_M rows × BLOCK_N outputs of one module. Words are read once per tile and unpacked in registers;
Ŵ is scaled in float32 and rounded to x's dtype for the multiplication, as a dense weight would be. t Bᵀ continues in
the same float32 accumulator.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .codes import load_factor, load_unit, load_zeros, unit_codes
from .shrink import load_parts
from .store import finish_tile


@triton.jit
def weight_tile(
    qweight, qzeros, scales, g_idx, start, n, in_n, in_features, columns,
    BITS: tl.constexpr, CODES: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Ŵᵀ of inputs start … start + BLOCK_K: BLOCK_K × BLOCK_N, float32. Inputs past the end hold anything finite."""
    UNITS: tl.constexpr = BLOCK_K // CODES
    u = (start // CODES + tl.arange(0, UNITS))[:, None, None]
    words0, words1, words2 = load_unit(
        qweight, u, n[None, None, :], in_n[None, None, :], (in_features * BITS + 31) // 32, columns, BITS
    )
    codes = unit_codes(words0, words1, words2, tl.arange(0, CODES)[None, :, None], BITS)
    codes = tl.reshape(codes, (BLOCK_K, BLOCK_N))
    if g_idx is None:
        # A tile lies within one group.
        group = start // GROUP_SIZE
        live = in_n[None, :]
    else:
        k = start + tl.arange(0, BLOCK_K)
        group = tl.load(g_idx + k, mask=k < in_features, other=0)[:, None]
        live = (k < in_features)[:, None] & in_n[None, :]
    scale = tl.load(scales + group * columns + n[None, :], mask=live, other=0).to(tl.float32)
    zeros = load_zeros(qzeros, group, n[None, :], live, columns, BITS)
    return (codes - zeros).to(tl.float32) * scale


@triton.jit
def _gemm_tile(
    x, parts, y, qweight, qzeros, scales, g_idx, bias, up, up_scales, partials, locks, lock, m_tile, tile, split,
    rows, in_features, columns, first_column, all_columns, rank, first_rank, all_ranks, part_count,
    inputs_per_split,
    BITS: tl.constexpr, CODES: tl.constexpr, GROUP_SIZE: tl.constexpr,
    FACTOR_BITS: tl.constexpr, FACTOR_GROUP: tl.constexpr, PARTS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    WEIGHED: tl.constexpr,
):  # fmt: skip
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = m < rows
    in_n = n < columns
    x_rows = x + m.to(tl.int64)[:, None] * in_features
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * inputs_per_split
    for start in range(first, tl.minimum(first + inputs_per_split, in_features), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        xs = tl.load(x_rows + k[None, :], mask=in_m[:, None] & (k < in_features)[None, :], other=0)
        weight = weight_tile(qweight, qzeros, scales, g_idx, start, n, in_n, in_features, columns,
                             BITS, CODES, GROUP_SIZE, BLOCK_N, BLOCK_K)  # fmt: skip
        acc = tl.dot(xs, weight.to(xs.dtype), acc, input_precision="ieee")
    if up is not None:
        for start in range(split * BLOCK_R, rank, SPLITS * BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            in_r = r < rank
            t = load_parts(parts, m[:, None], (first_rank + r)[None, :], in_m[:, None] & in_r[None, :],
                           part_count, rows, all_ranks, PARTS)  # fmt: skip
            if WEIGHED:
                # A component of t that is 0 in all rows belongs to a member without weight.
                in_r = in_r & (tl.max(tl.abs(t), 0) != 0)
            b = load_factor(up, up_scales, r[:, None], n[None, :], in_r[:, None] & in_n[None, :], columns,
                            FACTOR_BITS, FACTOR_GROUP)  # fmt: skip
            acc = tl.dot(t.to(x.dtype.element_ty), b.to(x.dtype.element_ty), acc, input_precision="ieee")
    finish_tile(acc, y, bias, partials, locks, lock, split, m, n, rows, columns, first_column, all_columns, SPLITS)


@triton.jit(do_not_specialize=["rows"])
def gemm_kernel(
    x, parts, ys, qweights, qzeros, scales, g_idx, biases, ups, up_scales, outs, ranks, partials, locks,
    rows, in_features, all_columns, all_ranks, part_count, inputs_per_split,
    MODULES: tl.constexpr, BITS: tl.constexpr, CODES: tl.constexpr, GROUP_SIZE: tl.constexpr,
    FACTOR_BITS: tl.constexpr, FACTOR_GROUP: tl.constexpr, PARTS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    WEIGHED: tl.constexpr,
):  # fmt: skip
    """Grid: row tiles × tiles of outputs, module after module × splits."""
    m_tile = tl.program_id(0)
    lock = tl.program_id(1) * tl.num_programs(0) + m_tile
    first_tile = 0
    first_column = 0
    first_rank = 0
    for j in tl.static_range(MODULES):
        tile = tl.program_id(1) - first_tile
        tiles = tl.cdiv(outs[j], BLOCK_N)
        if (tile >= 0) & (tile < tiles):
            _gemm_tile(
                x, parts, ys[j], qweights[j], qzeros[j], scales[j], g_idx[j], biases[j], ups[j], up_scales[j],
                partials, locks, lock, m_tile, tile, tl.program_id(2),
                rows, in_features, outs[j], first_column, all_columns, ranks[j], first_rank, all_ranks, part_count,
                inputs_per_split, BITS, CODES, GROUP_SIZE, FACTOR_BITS, FACTOR_GROUP, PARTS, SPLITS,
                BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, WEIGHED,
            )  # fmt: skip
        first_tile += tiles
        first_column += outs[j]
        first_rank += ranks[j]
