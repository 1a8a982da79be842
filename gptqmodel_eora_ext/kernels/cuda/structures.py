"""What the compiled launches are told, field by field as in csrc/linears.h."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..triton.ops import StackedLinears

MOST_MODULES = 4
# Codes of a unit, the shortest run that fills whole words.
UNIT_CODES = {2: 16, 3: 32, 4: 8}
# Features are copied in 16 bytes of 16-bit numbers.
COPIED = 8
HALF = (torch.float16, torch.bfloat16)
# Outputs of a tile: those of all launches are multiples of it, since modules begin with a tile.
COLUMNS = 32
# How 16-bit numbers and factors are stored: `Kind` of the sources.
KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


def integers(*names: str) -> tuple[tuple[str, type], ...]:
    """Fields of 32 bits."""
    return tuple((name, ctypes.c_int32) for name in names)


def pointers(*names: str) -> tuple[tuple[str, type], ...]:
    """Fields that hold an address, or None."""
    return tuple((name, ctypes.c_void_p) for name in names)


class Module(ctypes.Structure):
    """One module's tensors and place."""

    _fields_ = (
        *pointers("qweight", "qzeros", "scales", "bias", "up", "up_scales"),
        *integers("columns", "rank", "first_rank", "first_tile"),
    )


class Linears(ctypes.Structure):
    """Modules that read the same input."""

    _fields_ = (
        ("modules", Module * MOST_MODULES),
        *pointers("down", "down_scales", "member_of"),
        *integers("module_count", "components", "in_features", "group_size", "scale_kind", "bias_kind", "factor_kind",
                  "members"),
    )  # fmt: skip


def readable(stacked: StackedLinears) -> bool:
    """Whether the kernels can read these weights and factors, but for their groups, which each cuts in its own way."""
    return (
        stacked.bits in UNIT_CODES
        and len(stacked.qweights) <= MOST_MODULES
        and all(one is None for one in stacked.g_idx)
        and all(features % COPIED == 0 for features in (stacked.in_features, *(q.shape[1] for q in stacked.qweights)))
        and {one.dtype for one in stacked.scales} in [{one} for one in HALF]
        and len({one.dtype for one in stacked.biases if one is not None}) <= 1
        and (stacked.down is None or stacked.factor_bits < 16 or stacked.down.dtype in HALF)
    )


def described(stacked: StackedLinears) -> Linears:
    """The addresses and sizes of what `StackedLinears` holds; its tensors have to outlive the result."""
    made = Linears(
        down=_address(stacked.down), down_scales=_address(stacked.down_scales), member_of=_address(stacked.member_of),
        module_count=len(stacked.qweights), components=0 if stacked.down is None else stacked.down.shape[0],
        in_features=stacked.in_features, group_size=stacked.group_size, scale_kind=KINDS[stacked.scales[0].dtype],
        bias_kind=next((KINDS[one.dtype] for one in stacked.biases if one is not None), 0),
        factor_kind=_factor_kind(stacked), members=stacked.members,
    )  # fmt: skip
    first_rank = first_tile = 0
    for index, (qweight, up) in enumerate(zip(stacked.qweights, stacked.ups, strict=True)):
        columns, rank = qweight.shape[1], 0 if up is None else up.shape[0]
        made.modules[index] = Module(
            qweight=_address(qweight), qzeros=_address(stacked.qzeros[index]), scales=_address(stacked.scales[index]),
            bias=_address(stacked.biases[index]), up=_address(up), up_scales=_address(stacked.up_scales[index]),
            columns=columns, rank=rank, first_rank=first_rank, first_tile=first_tile,
        )  # fmt: skip
        first_rank += rank
        first_tile += -(-columns // COLUMNS)
    return made


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _factor_kind(stacked: StackedLinears) -> int:
    if stacked.down is None:
        return KINDS[torch.float16]
    return stacked.factor_bits if stacked.factor_bits < 16 else KINDS[stacked.down.dtype]
