"""How a tile's sum becomes y: added over the splits of the inputs in a fixed order, biased, rounded once."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# Values of a tile of which threads can hold all splits in registers.
UNROLLED = tl.constexpr(1024)


@triton.jit
def finish_tile(
    acc, y, bias, partials, locks, lock, split, m, n, rows, columns, first_column, all_columns,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Store a tile of y, or add it up first if the inputs were split.

    Every split writes its sum to ``partials`` (SPLITS × rows × all_columns, float32) and counts itself at its lock; the
    last to arrive adds them all in order of the splits, whoever it is. So there is no atomic addition of floats, and
    the result does not depend on timing.
    """
    in_m = m < rows
    in_n = n < columns
    live = in_m[:, None] & in_n[None, :]
    if SPLITS > 1:
        place = partials + m.to(tl.int64)[:, None] * all_columns + (first_column + n)[None, :]
        step = rows * all_columns
        tl.store(place + split * step, acc, mask=live)
        # All threads of the program have stored before one of them counts and thereby publishes.
        tl.debug_barrier()
        arrived = tl.atomic_add(locks + lock, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            acc = tl.zeros_like(acc)
            if acc.shape[0] * acc.shape[1] <= UNROLLED:
                for other in tl.static_range(SPLITS):
                    acc += tl.load(place + other * step, mask=live, other=0.0, cache_modifier=".cg")
            else:
                for other in range(SPLITS):
                    acc += tl.load(place + other * step, mask=live, other=0.0, cache_modifier=".cg")
            _store(acc, y, bias, m, n, columns, live)
    else:
        _store(acc, y, bias, m, n, columns, live)


@triton.jit
def _store(acc, y, bias, m, n, columns, live):
    if bias is not None:
        acc += tl.load(bias + n, mask=n < columns, other=0).to(tl.float32)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * columns + n[None, :], acc.to(y.dtype.element_ty), mask=live)
