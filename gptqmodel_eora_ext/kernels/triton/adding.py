"""The adapter alone, on the output of a kernel that is not ours: what the hosts' adapter calls on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from ..devices import UNCOMPILED, aligned, at_once, on, traced
from . import settings
from .correction import COUNTERS, correction_kernel, counters
from .launch import Known, launch


def add_correction(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    y: torch.Tensor,
    slot: int,
    weights: torch.Tensor | None = None,
    member_of: torch.Tensor | None = None,
) -> None:
    """y += ((x Aᵀ) ∘ g) Bᵀ in place: one launch, or for many rows two products.

    Args:
        x: … × in, float16, bfloat16 or float32, as are all others.
        down, up: A, rank × in, and Bᵀ, rank × out, both contiguous.
        y: … × out, contiguous; of as many rows as x, in whatever shape.
        slot: graphs that were captured with the same one, modulo `correction.COUNTERS`, must not run at the same time.
        weights: rows × members, float32, on x's device; None weighs all components by 1.
        member_of: int32, the member of each component, with ``weights``.

    Raises:
        NotImplementedError: for weights while a compiler traces: they change from call to call.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if traced(x):
        if weights is not None:
            raise NotImplementedError(UNCOMPILED)
        correct(rows, down, up, y.view(-1, y.shape[-1]), slot)
    else:
        _correct(rows, down, up, y.view(-1, y.shape[-1]), slot, weights, member_of)


_corrections: Known = {}


@torch.library.custom_op("gptqmodel_eora_ext::correct", mutates_args=("y",))
def correct(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, y: torch.Tensor, slot: int) -> None:
    """y += (x Aᵀ) Bᵀ, on x (rows × in) and y (rows × out); see `add_correction`."""
    _correct(x, down, up, y, slot)


@correct.register_fake
def _(*_: Any) -> None:
    return None


def _correct(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    y: torch.Tensor,
    slot: int,
    weights: torch.Tensor | None = None,
    member_of: torch.Tensor | None = None,
) -> None:
    rows, in_features = x.shape
    rank, columns = up.shape
    if rows == 0:
        return
    few = rows <= settings.MOST_CORRECTION_ROWS and rank <= settings.most_correction_rank(rows)
    bank = counters(x.device) if few else None
    if bank is None:
        t = x @ down.T
        y.addmm_(t if weights is None else (t * weights[:, member_of]).to(x.dtype), up)
        return
    programs = settings.programs(at_once(x.device))
    chosen = settings.correction(rows, rank, in_features, columns, x.dtype, programs)
    parts = x.new_empty(chosen.splits * rows * rank, dtype=torch.float32)
    constants = {
        "PROGRAMS": programs, "PARTS": chosen.splits, "BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k, "BLOCK_R": chosen.block_r, "UP_RANKS": settings.CORRECTION_RANKS,
        "MEMBERS": 0 if weights is None else weights.shape[1],
    }  # fmt: skip
    kinds = (x.device, x.dtype, chosen, rank, in_features, columns, constants["MEMBERS"])
    key = kinds if aligned(x, down, up, y) else None
    with on(x.device):
        launch(
            _corrections, key, correction_kernel, (programs, 1, 1),
            (x, down, up, y, weights, member_of, parts, bank, slot % COUNTERS, rows, rank, in_features, columns,
             chosen.per_split),
            constants, {**chosen.options(), "launch_cooperative_grid": True},
        )  # fmt: skip
