"""y = x Ŵᵀ + t Bᵀ + bias for one row of x: bound by memory, without tensor cores.

Each program takes BLOCK_N outputs of one module and a share of its inputs, reads every word of codes once, coalesced
along the outputs, and multiplies in float32. Scales and zeros enter once per unit of codes (`codes.mantissa`):

    y[n] = Σ_units s 2^bits (Σ_i x_i μ(c_i) − μ(z) Σ_i x_i),   μ(c) = 1 + c / 2^bits

The programs that share the inputs of a tile share its ranks too, so that no one does the up-projection alone.

All tiles are two-dimensional, units × outputs, and x is loaded as a column of them: with a dimension more, Triton moves
every weight through shared memory to change its layout.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .codes import load_factor, load_unit, load_zeros, mantissa, window, zero_mantissa
from .shrink import load_parts
from .store import finish_tile


@triton.jit
def _inputs(
    x, qweight, qzeros, scales, g_idx, first, last, n, in_n, in_features, columns, windows, one,
    BITS: tl.constexpr, CODES: tl.constexpr, GROUP_UNITS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Σ over the units from ``first`` to ``last``: BLOCK_N, float32."""
    WINDOW: tl.constexpr = 4 if BITS == 8 else 8
    word_rows = (in_features * BITS + 31) // 32
    acc = tl.zeros((BLOCK_U, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_U):
        u = start + tl.arange(0, BLOCK_U)
        in_u = u < last
        live = in_u[:, None] & in_n[None, :]
        words0, words1, words2 = load_unit(qweight, u[:, None], n[None, :], live, word_rows, columns, BITS)
        products = tl.zeros((BLOCK_U, BLOCK_N), tl.float32)
        for part in range(windows):
            word = window(words0, words1, words2, part, BITS)
            for i in tl.static_range(WINDOW):
                k = (u * CODES + part * WINDOW + i)[:, None]
                in_k = in_u[:, None] if EVEN else in_u[:, None] & (k < in_features)
                xs = tl.load(x + k, mask=in_k, other=0).to(tl.float32)
                weight = mantissa(word, one, i, BITS)
                if g_idx is not None:
                    group = tl.load(g_idx + k, mask=in_k, other=0)
                    weight = _scaled(weight, qzeros, scales, group, n, live, columns, BITS)
                products += xs * weight
        if g_idx is None:
            k = (u * CODES)[:, None] + tl.arange(0, CODES)[None, :]
            xs = tl.load(x + k, mask=in_u[:, None] & (k < in_features), other=0).to(tl.float32)
            sums = tl.sum(xs, 1)[:, None]
            group = (u // GROUP_UNITS)[:, None]
            scale = tl.load(scales + group * columns + n[None, :], mask=live, other=0).to(tl.float32)
            zero = zero_mantissa(load_zeros(qzeros, group, n[None, :], live, columns, BITS), BITS)
            acc += scale * (products - zero * sums)
        else:
            acc += products
    return tl.sum(acc, 0) * (1 << BITS)


@triton.jit
def _scaled(weight, qzeros, scales, group, n, live, columns, BITS: tl.constexpr):
    """s (μ(c) − μ(z)), for inputs that each have a group of their own."""
    scale = tl.load(scales + group * columns + n[None, :], mask=live, other=0).to(tl.float32)
    return scale * (weight - zero_mantissa(load_zeros(qzeros, group, n[None, :], live, columns, BITS), BITS))


@triton.jit
def _gemv_tile(
    x, parts, y, qweight, qzeros, scales, g_idx, bias, up, up_scales, partials, locks, lock, tile, split,
    in_features, columns, first_column, all_columns, rank, first_rank, all_ranks, part_count,
    windows, one, units_per_split,
    BITS: tl.constexpr, CODES: tl.constexpr, GROUP_UNITS: tl.constexpr, EVEN: tl.constexpr,
    FACTOR_BITS: tl.constexpr, FACTOR_GROUP: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_R: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < columns
    first = split * units_per_split
    last = tl.minimum(first + units_per_split, (in_features + CODES - 1) // CODES)
    acc = _inputs(
        x, qweight, qzeros, scales, g_idx, first, last, n, in_n, in_features, columns, windows, one,
        BITS, CODES, GROUP_UNITS, EVEN, BLOCK_N, BLOCK_U,
    )  # fmt: skip
    if up is not None:
        corrections = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for start in range(split * BLOCK_R, rank, SPLITS * BLOCK_R):
            r = (start + tl.arange(0, BLOCK_R))[:, None]
            t = load_parts(parts, tl.zeros_like(r), first_rank + r, r < rank, part_count, 1, all_ranks, PARTS)
            live = r < rank
            if WEIGHED:
                # A component of t that is 0 belongs to a member without weight.
                live = live & (t != 0)
            b = load_factor(up, up_scales, r, n[None, :], live & in_n[None, :], columns,
                            FACTOR_BITS, FACTOR_GROUP)  # fmt: skip
            corrections += t * b
        acc += tl.sum(corrections, 0)
    finish_tile(acc[None, :], y, bias, partials, locks, lock, split, tl.arange(0, 1), n, 1, columns, first_column,
                all_columns, SPLITS)  # fmt: skip


@triton.jit
def gemv_kernel(
    x, parts, ys, qweights, qzeros, scales, g_idx, biases, ups, up_scales, outs, ranks, partials, locks,
    in_features, all_columns, all_ranks, part_count, windows, one, units_per_split,
    MODULES: tl.constexpr, BITS: tl.constexpr, CODES: tl.constexpr, GROUP_UNITS: tl.constexpr, EVEN: tl.constexpr,
    FACTOR_BITS: tl.constexpr, FACTOR_GROUP: tl.constexpr, PARTS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_R: tl.constexpr,
    WEIGHED: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of outputs, module after module × splits.

    ``windows`` are the `codes.window`s of a unit: a number of run time, since the compiler would unroll a constant and
    hold x for all codes of a unit in registers. EVEN: units fill the inputs.
    """
    lock = tl.program_id(0)
    first_tile = 0
    first_column = 0
    first_rank = 0
    for j in tl.static_range(MODULES):
        tile = lock - first_tile
        tiles = tl.cdiv(outs[j], BLOCK_N)
        if (tile >= 0) & (tile < tiles):
            _gemv_tile(
                x, parts, ys[j], qweights[j], qzeros[j], scales[j], g_idx[j], biases[j], ups[j], up_scales[j],
                partials, locks, lock, tile, tl.program_id(1),
                in_features, outs[j], first_column, all_columns, ranks[j], first_rank, all_ranks, part_count,
                windows, one, units_per_split,
                BITS, CODES, GROUP_UNITS, EVEN, FACTOR_BITS, FACTOR_GROUP, PARTS, SPLITS, BLOCK_N, BLOCK_U, BLOCK_R,
                WEIGHED,
            )  # fmt: skip
        first_tile += tiles
        first_column += outs[j]
        first_rank += ranks[j]
