"""t = x Aᵀ for the stacked A of all modules that read x, cut along the inputs into partial sums.

The parts are added by the kernels that read them, in order: the sum is deterministic and needs no launch of its own.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .codes import load_factor

# Values of a tile of which threads can hold all parts in registers, beside an accumulator.
UNROLLED = tl.constexpr(512)


@triton.jit
def shrink_tile(
    x, down, down_scales, weights, member_of, parts, m_tile, r_tile, split, rows, rank, in_features, inputs_per_split,
    FACTOR_BITS: tl.constexpr, FACTOR_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """One tile of one part: parts[split, m, r] = g[m, r] Σ_k x[m, k] A[r, k] over the split's inputs.

    g is 1 where MEMBERS is 0, else the row's weight of the member that the component belongs to. Components without any
    weight in the tile are not read.
    """
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    r = r_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    in_m = m < rows
    in_r = r < rank
    read_r = in_r
    if MEMBERS > 0:
        member = tl.load(member_of + r, mask=in_r, other=0)
        weight = tl.load(weights + m.to(tl.int64)[None, :] * MEMBERS + member[:, None],
                         mask=in_m[None, :] & in_r[:, None], other=0.0)  # fmt: skip
        read_r = in_r & (tl.max(tl.abs(weight), 1) > 0)
    first = split * inputs_per_split
    last = tl.minimum(first + inputs_per_split, in_features)
    # One row is multiplied without tensor cores, for which it would be padded to sixteen.
    sums = tl.zeros((BLOCK_R, BLOCK_K if BLOCK_M == 1 else BLOCK_M), tl.float32)
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < last
        a = load_factor(down, down_scales, r[:, None], k[None, :], read_r[:, None] & in_k[None, :], in_features,
                        FACTOR_BITS, FACTOR_GROUP)  # fmt: skip
        if BLOCK_M == 1:
            sums += tl.load(x + k[None, :], mask=in_k[None, :], other=0).to(tl.float32) * a
        else:
            xs = tl.load(x + m.to(tl.int64)[None, :] * in_features + k[:, None],
                         mask=in_m[None, :] & in_k[:, None], other=0)  # fmt: skip
            sums = tl.dot(a.to(xs.dtype), xs, sums, input_precision="ieee")
    if BLOCK_M == 1:
        sums = tl.sum(sums, 1)[:, None]
    if MEMBERS > 0:
        sums = sums * weight
    place = parts + (split * rows + m.to(tl.int64)[None, :]) * rank + r[:, None]
    tl.store(place, sums, mask=in_m[None, :] & in_r[:, None])


@triton.jit(do_not_specialize=["rows"])
def shrink_kernel(
    x, down, down_scales, weights, member_of, parts, locks, rows, rank, in_features, inputs_per_split, lock_count,
    FACTOR_BITS: tl.constexpr, FACTOR_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, LOCKS: tl.constexpr,
    MEMBERS: tl.constexpr,
):  # fmt: skip
    """Grid: rank tiles × row tiles × splits. Also zeroes the locks that the next launch counts with."""
    r_tile = tl.program_id(0)
    m_tile = tl.program_id(1)
    split = tl.program_id(2)
    if r_tile + m_tile + split == 0:
        for start in range(0, lock_count, LOCKS):
            place = start + tl.arange(0, LOCKS)
            tl.store(locks + place, tl.zeros((LOCKS,), tl.int32), mask=place < lock_count)
    shrink_tile(
        x, down, down_scales, weights, member_of, parts, m_tile, r_tile, split, rows, rank, in_features,
        inputs_per_split, FACTOR_BITS, FACTOR_GROUP, BLOCK_M, BLOCK_R, BLOCK_K, MEMBERS,
    )  # fmt: skip


@triton.jit
def load_parts(parts, m, r, live, count, rows, rank, PARTS: tl.constexpr):
    """t of ``m`` × ``r``: the parts of `shrink_kernel`, added in order; float32.

    Read past the first-level cache, which does not see what other programs of the same launch wrote. All reads of a
    small tile are under way at once: one after the other, they took longer than the product. ``count`` is PARTS as a
    number of run time: larger tiles would spill if the compiler unrolled their loop.
    """
    place = parts + m.to(tl.int64) * rank + r
    total = tl.load(place, mask=live, other=0.0, cache_modifier=".cg")
    if live.shape[0] * live.shape[1] <= UNROLLED:
        for part in tl.static_range(1, PARTS):
            total += tl.load(place + part * (rows * rank), mask=live, other=0.0, cache_modifier=".cg")
    else:
        for part in range(1, count):
            total += tl.load(place + part * (rows * rank), mask=live, other=0.0, cache_modifier=".cg")
    return total
