"""y += (x Aᵀ) Bᵀ in one launch, on the output of a kernel that is not ours, for few rows of x.

Every program makes its share of t = x Aᵀ, counts itself, waits until all have, and adds t Bᵀ to its tiles of y. All of
them run at the same time, which a cooperative launch guarantees, so whoever waits is waited for by nobody. What a
program needs of B is on its way while it makes its share of t.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .shrink import shrink_tile

# Launches on one stream follow each other and could share a counter. Captured graphs may be replayed on several streams
# at once: there every adapter has its own, among so many.
COUNTERS = 4096
# In place of the address of a stream: all that are being captured.
CAPTURED = -1


@triton.jit
def _up(up, r, n, live, columns):
    """Bᵀ at ``r`` × ``n``, as it is stored; ``live`` tells which of ``r`` to read."""
    return tl.load(up + r[:, None] * columns + n[None, :], mask=live[:, None] & (n < columns)[None, :], other=0)


@triton.jit(do_not_specialize=["rows", "slot"])
def correction_kernel(
    x, down, up, y, weights, member_of, parts, counters, slot, rows, rank, in_features, columns, inputs_per_split,
    PROGRAMS: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, UP_RANKS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """Grid: PROGRAMS, a power of two. A counter only ever grows, by PROGRAMS in every launch."""
    program = tl.program_id(0)
    counter = counters + slot
    # While a program has not counted itself, the counter stays below the next multiple.
    complete = (tl.load(counter, volatile=True) & -PROGRAMS) + PROGRAMS
    m_tiles = tl.cdiv(rows, BLOCK_M)
    r_tiles = tl.cdiv(rank, BLOCK_R)
    columns_of_tile = tl.arange(0, BLOCK_N)
    ranks_of_step = tl.arange(0, UP_RANKS)
    # With weights, which components are read is known once t is.
    ahead = rank if MEMBERS == 0 else 0
    b = _up(up, ranks_of_step, program // m_tiles * BLOCK_N + columns_of_tile, ranks_of_step < ahead, columns)
    for share in range(program, m_tiles * r_tiles * PARTS, PROGRAMS):
        tile = share % (m_tiles * r_tiles)
        shrink_tile(
            x, down, None, weights, member_of, parts, tile // r_tiles, tile % r_tiles, share // (m_tiles * r_tiles),
            rows, rank, in_features, inputs_per_split, 16, 1, BLOCK_M, BLOCK_R, BLOCK_K, MEMBERS,
        )  # fmt: skip
    # All threads of the program have stored before one of them counts and thereby publishes.
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    # The difference, not the order, of two numbers that wrap around.
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") - complete < 0:
        pass
    # One stage: the loads of one step, prefetched for the next, would take all shared memory.
    for tile in tl.range(program, m_tiles * tl.cdiv(columns, BLOCK_N), PROGRAMS, num_stages=1):
        m = tile % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile // m_tiles * BLOCK_N + columns_of_tile
        in_m = m < rows
        place = y + m.to(tl.int64)[:, None] * columns + n[None, :]
        live = in_m[:, None] & (n < columns)[None, :]
        acc = tl.load(place, mask=live, other=0).to(tl.float32)
        for start in tl.range(0, rank, UP_RANKS, num_stages=1):
            r = start + ranks_of_step
            if (MEMBERS == 0) & ((tile != program) | (start > 0)):
                b = _up(up, r, n, r < rank, columns)
            # All parts are on their way at once: one after the other, they took longer than both products.
            if BLOCK_M == 1:
                part = tl.arange(0, PARTS)
                t = tl.load(parts + part[None, :] * rank + r[:, None], mask=(r < rank)[:, None], other=0.0,
                            cache_modifier=".cg")  # fmt: skip
                t_sum = tl.sum(t, 1)
                if MEMBERS > 0:
                    b = _up(up, r, n, (r < rank) & (t_sum != 0), columns)
                acc += tl.sum(t_sum[:, None] * b.to(tl.float32), 0)[None, :]
            else:
                first = parts + m.to(tl.int64)[:, None] * rank + r[None, :]
                known = in_m[:, None] & (r < rank)[None, :]
                t = tl.load(first, mask=known, other=0.0, cache_modifier=".cg")
                for part in tl.static_range(1, PARTS):
                    t += tl.load(first + part * (rows * rank), mask=known, other=0.0, cache_modifier=".cg")
                if MEMBERS > 0:
                    b = _up(up, r, n, (r < rank) & (tl.max(tl.abs(t), 0) != 0), columns)
                acc = tl.dot(t.to(b.dtype), b, acc, input_precision="ieee")
        tl.store(place, acc.to(y.dtype.element_ty), mask=live)


_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def counters(device: torch.device) -> torch.Tensor | None:
    """Counters that launches on the current stream may use, int32; None where they would have to be made in a graph.

    A graph would set them back whenever it is replayed, and they would hold anything until then.
    """
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    stream = CAPTURED if captured else torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _counters.get((device, stream))
    if found is None and not captured:
        for key in (CAPTURED, stream):
            found = _counters.setdefault((device, key), torch.zeros(COUNTERS, dtype=torch.int32, device=device))
    return found
