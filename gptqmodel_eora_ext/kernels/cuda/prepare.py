"""Which compiled kernels serve weights that lie on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..dispatch import ALL, CUDA, asked_for, switched_off
from . import few_rows, many_rows
from .build import device_of

if TYPE_CHECKING:
    from ..triton.ops import StackedLinears


@dataclass(frozen=True)
class Compiled:
    """The launches over the same weights; None where one does not serve them."""

    few: few_rows.FewRows | None
    many: many_rows.ManyRows | None


def compiled(stacked: StackedLinears) -> Compiled | None:
    """The launches that serve; None for other devices than NVIDIA's and where nobody asked for them."""
    device = stacked.qweights[0].device
    wanted = CUDA in asked_for() and ALL not in switched_off()
    known = device_of(device) if device.type == "cuda" and wanted else None
    if known is None:
        return None
    few = few_rows.FewRows(stacked, known) if few_rows.serves(stacked) else None
    many = many_rows.ManyRows(stacked, known) if known.hopper and many_rows.serves(stacked) else None
    return Compiled(few, many)
