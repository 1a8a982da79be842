"""y += (x Aᵀ) Bᵀ in one launch, for kernels that are not ours.

The launch holds programs of two kinds: some make t = x Aᵀ (`shrink.shrink_tile`), others add t Bᵀ to a tile of y. The
latter wait until the tiles of t that they need are counted as done. What a program does is told by the ticket it draws
when it starts, and the tickets of t come first: whoever waits, waits for programs that have started and wait for
nobody. So no program waits for ever, however many of them fit the device at a time.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .codes import load_factor
from .shrink import load_parts, shrink_tile


@triton.jit
def _expand_tile(
    parts, y, up, up_scales, m_tile, tile, part_count, rows, rank, columns,
    FACTOR_BITS: tl.constexpr, FACTOR_GROUP: tl.constexpr, INPUT: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = m < rows
    in_n = n < columns
    place = y + m.to(tl.int64)[:, None] * columns + n[None, :]
    live = in_m[:, None] & in_n[None, :]
    acc = tl.load(place, mask=live, other=0).to(tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        in_r = r < rank
        t = load_parts(parts, m[:, None], r[None, :], in_m[:, None] & in_r[None, :], part_count, rows, rank, PARTS)
        b = load_factor(up, up_scales, r[:, None], n[None, :], in_r[:, None] & in_n[None, :], columns,
                        FACTOR_BITS, FACTOR_GROUP)  # fmt: skip
        if BLOCK_M == 1:
            acc += tl.sum(tl.trans(t) * b, 0)[None, :]
        else:
            acc = tl.dot(t.to(INPUT), b.to(INPUT), acc, input_precision="ieee")
    tl.store(place, acc.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows"])
def shrink_expand_kernel(
    x, down, down_scales, up, up_scales, y, parts, locks, rows, rank, in_features, columns, inputs_per_split,
    part_count, FACTOR_BITS: tl.constexpr, FACTOR_GROUP: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: one dimension, row tiles × (rank tiles × splits + output tiles).

    ``locks`` is zero on entry: the ticket counter, then for each row tile the number of tiles of t that are done.
    """
    m_tiles = tl.cdiv(rows, BLOCK_M)
    r_tiles = tl.cdiv(rank, BLOCK_R)
    shares = r_tiles * PARTS
    ticket = tl.atomic_add(locks, 1, sem="relaxed", scope="gpu")
    if ticket < m_tiles * shares:
        m_tile = ticket // shares
        share = ticket % shares
        shrink_tile(
            x, down, down_scales, parts, m_tile, share % r_tiles, share // r_tiles, rows, rank, in_features,
            inputs_per_split, FACTOR_BITS, FACTOR_GROUP, BLOCK_M, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        # All threads of the program have stored before one of them counts and thereby publishes.
        tl.debug_barrier()
        tl.atomic_add(locks + 1 + m_tile, 1, sem="release", scope="gpu")
    else:
        tiles = tl.cdiv(columns, BLOCK_N)
        m_tile = (ticket - m_tiles * shares) // tiles
        tile = (ticket - m_tiles * shares) % tiles
        while tl.atomic_add(locks + 1 + m_tile, 0, sem="acquire", scope="gpu") < shares:
            pass
        _expand_tile(
            parts, y, up, up_scales, m_tile, tile, part_count, rows, rank, columns,
            FACTOR_BITS, FACTOR_GROUP, x.dtype.element_ty, PARTS, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
