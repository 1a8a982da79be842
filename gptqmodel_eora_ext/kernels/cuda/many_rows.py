"""y = x Ŵᵀ + t Bᵀ + bias for many rows of x on Hopper (csrc/many_rows.cuh): what it serves, how it is cut."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from ..devices import ALIGNMENT
from .few_rows import NO_SHIFT, Device
from .structures import HALF, MOST_MODULES, described, integers, readable
from .workspaces import Workspaces, place_of

if TYPE_CHECKING:
    from ..triton.ops import StackedLinears

# As in csrc/many_rows.cuh.
OUTPUTS = 128
DEPTH = 64
ROW_TILES = (64, 128)
SMALLEST_GROUP = 16
# Splits of the inputs at most, and the steps that one has at least: fewer take longer to add than to multiply.
MOST_SPLITS = 8
FEWEST_STEPS = 8
# Tiles whose inputs can be split, at most: those that leave a multiprocessor free.
MOST_COUNTERS = 256


class Plan(ctypes.Structure):
    """How one number of rows is cut: ``ManyRowsCut`` and ``ManyRowsPlan`` of the sources, in their order."""

    _fields_ = integers("steps", "steps_per_split", "splits", "group_shift", "groups_per_step",
                        "bits", "bf16", "rows_of_tile", "output_tiles")  # fmt: skip


def group_cut(group_size: int, in_features: int) -> tuple[int, int] | None:
    """By how much a step's number is shifted to its group, and groups of a step; None for groups that do not fit."""
    if group_size >= in_features:
        return NO_SHIFT, 1
    if group_size & (group_size - 1) or group_size < SMALLEST_GROUP:
        return None
    return (0, DEPTH // group_size) if group_size < DEPTH else ((group_size // DEPTH).bit_length() - 1, 1)


def serves(stacked: StackedLinears) -> bool:
    """Whether the kernel can read these weights and factors; of x it takes float16 and bfloat16."""
    return readable(stacked) and group_cut(stacked.group_size, stacked.in_features) is not None


def plan(stacked: StackedLinears, rows: int, dtype: torch.dtype, processors: int) -> Plan:
    """How ``rows`` of x are multiplied by weights that `serves` says yes to."""
    cut = group_cut(stacked.group_size, stacked.in_features)
    assert cut is not None
    output_tiles = sum(-(-qweight.shape[1] // OUTPUTS) for qweight in stacked.qweights)
    rows_of_tile = next((one for one in ROW_TILES if rows <= one), ROW_TILES[-1])
    tiles = output_tiles * -(-rows // rows_of_tile)
    steps = -(-stacked.in_features // DEPTH)
    splits = max(min(processors // tiles, steps // FEWEST_STEPS, MOST_SPLITS), 1)
    per_split = -(-steps // splits)
    return Plan(
        steps=steps, steps_per_split=per_split, splits=-(-steps // per_split), group_shift=cut[0],
        groups_per_step=cut[1], bits=stacked.bits, bf16=int(dtype == torch.bfloat16), rows_of_tile=rows_of_tile,
        output_tiles=output_tiles,
    )  # fmt: skip


class ManyRows:
    """Weights of a `StackedLinears` as the launch reads them; keeps their tensors alive.

    Args:
        stacked: that `serves` says yes to.
        device: where they are.
    """

    def __init__(self, stacked: StackedLinears, device: Device) -> None:
        self._stacked, self._device = stacked, device
        self._linears = described(stacked)
        self._outs = tuple(qweight.shape[1] for qweight in stacked.qweights)
        self._workspaces = Workspaces(MOST_COUNTERS)

    def __call__(self, x: torch.Tensor, t: torch.Tensor | None) -> list[torch.Tensor] | None:
        """y of each module, rows × out in x's dtype; None where the launch does not serve x.

        Args:
            x: rows × in, on the weights' device, which is the current one.
            t: (x Aᵀ) ∘ g, rows × components in x's dtype; None without an adapter.

        Raises:
            RuntimeError: where CUDA refuses the launch.
        """
        rows = x.shape[0]
        if x.dtype not in HALF or x.data_ptr() % ALIGNMENT or not x.is_contiguous():
            return None
        made = plan(self._stacked, rows, x.dtype, self._device.processors)
        place, stream = place_of(x.get_device())
        counters = self._workspaces.at(place, x.device)
        if counters is None:
            return None
        partials = None
        if made.splits > 1:
            tiles = made.output_tiles * -(-rows // made.rows_of_tile)
            partials = x.new_empty(made.splits * tiles * made.rows_of_tile * OUTPUTS, dtype=torch.float32)
        t = None if t is None else t.contiguous()
        ys = [x.new_empty(rows, out) for out in self._outs]
        fault = self._device.library.eora_many_rows(
            ctypes.byref(self._linears), ctypes.byref(made), x.data_ptr(), None if t is None else t.data_ptr(), rows,
            None if partials is None else partials.data_ptr(), counters.data_ptr(), stream,
            (ctypes.c_void_p * MOST_MODULES)(*[y.data_ptr() for y in ys]),
        )  # fmt: skip
        if fault:
            raise RuntimeError(f"CUDA refuses the launch for {rows} rows: error {fault}.")
        return ys
