"""y = x Ŵᵀ + ((x Aᵀ) ∘ g) Bᵀ + bias for few rows in one launch (csrc/few_rows.cuh): what it serves, how it is cut."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..devices import ALIGNMENT
from .structures import COLUMNS, HALF, UNIT_CODES, described, integers, pointers, readable
from .workspaces import CAPTURED, Workspaces, place_of

if TYPE_CHECKING:
    from ..triton.ops import StackedLinears

# As in csrc/few_rows.cuh.
MOST_ROWS = 16
SHARE_STEP = 256
COUNTERS = 4
UNITS_OF_STEP = 4
# Steps of a chunk that the kernel is compiled for, most first.
STEPS = {2: (2, 1), 3: (1,), 4: (4, 2, 1)}
# Warps of a block that multiply. More where there are no more blocks than multiprocessors: then each has one to itself.
MANY_WARPS, FEW_WARPS = 16, 8
# Beyond these rows a thread needs so many registers that only blocks of FEW_WARPS fit.
MOST_ROWS_OF_MANY_WARPS = 8
# Warps that serve the adapter of a block that has a multiprocessor to itself, at one row: a power of two; else one.
MANY_HELPERS = 4
# Blocks of FEW_WARPS that run at once on a multiprocessor.
FEW_BLOCKS = 3
# Parts that x Aᵀ is cut into at most: every block reads all of them.
MOST_PARTS = 16
# Shifts any number of a chunk to the only group.
NO_SHIFT = 31


class Plan(ctypes.Structure):
    """How one number of rows is cut and launched: ``Cut`` and ``FewRows`` of the sources, in their order."""

    _fields_ = integers(
        "chunks", "group_shift", "parts", "inputs_per_part", "adapter_warps",
        "bits", "steps", "bf16", "rows", "blocks", "warps", "bytes",
    )  # fmt: skip


@dataclass(frozen=True)
class Device:
    """What launches depend on of a device.

    Attributes:
        library: the kernels, compiled for it.
        processors: multiprocessors.
        memory: bytes of shared memory that a block may take.
        hopper: whether it has Hopper's products of a warpgroup.
    """

    library: ctypes.CDLL
    processors: int
    memory: int
    hopper: bool


def steps_of(bits: int, group_size: int, in_features: int) -> int:
    """Steps of a chunk, which must lie within one group; 0 where the kernel serves no such groups."""
    for steps in STEPS.get(bits, ()):
        chunks, rest = divmod(group_size, steps * UNITS_OF_STEP * UNIT_CODES[bits])
        if group_size >= in_features or (rest == 0 and chunks & (chunks - 1) == 0):
            return steps
    return 0


def serves(stacked: StackedLinears) -> bool:
    """Whether the kernel can read these weights and factors; of x it takes float16 and bfloat16."""
    return (
        readable(stacked)
        and stacked.in_features % UNIT_CODES[stacked.bits] == 0
        and steps_of(stacked.bits, stacked.group_size, stacked.in_features) > 0
    )


def warps_of(tiles: int, rows: int, adapted: bool, device: Device) -> tuple[int, int]:
    """Warps of a block that multiply, if memory allows, and those that serve the adapter: a power of two, or none."""
    alone = tiles <= device.processors
    helpers = 0 if not adapted else MANY_HELPERS if alone and rows == 1 else 1
    if rows == 1:
        return MANY_WARPS if alone else FEW_WARPS, helpers
    return MANY_WARPS - helpers if alone and rows <= MOST_ROWS_OF_MANY_WARPS else FEW_WARPS, helpers


def plan(stacked: StackedLinears, rows: int, dtype: torch.dtype, device: Device) -> Plan:
    """How ``rows`` of x are multiplied on ``device``.

    Args:
        stacked: weights that `serves` says yes to.
        rows: of x, at most `MOST_ROWS`.
        dtype: of x.
        device: where.

    Returns:
        A plan of 0 warps where a block's memory does not suffice.
    """
    bits, in_features, group_size = stacked.bits, stacked.in_features, stacked.group_size
    components = 0 if stacked.down is None else stacked.down.shape[0]
    tiles = sum(-(-qweight.shape[1] // COLUMNS) for qweight in stacked.qweights)
    steps = steps_of(bits, group_size, in_features)
    inputs = steps * UNITS_OF_STEP * UNIT_CODES[bits]
    warps, helpers = warps_of(tiles, rows, components > 0, device)
    # A share for each warp that makes them, if as many blocks run at once as can.
    makers = min(tiles, FEW_BLOCKS * device.processors) * helpers
    most_parts = -(-in_features // SHARE_STEP)
    parts = min(max(makers // max(components, 1), 1), most_parts, MOST_PARTS)
    per_part = -(-most_parts // parts) * SHARE_STEP
    made = Plan(
        chunks=-(-in_features // inputs),
        group_shift=NO_SHIFT if group_size >= in_features else (group_size // inputs).bit_length() - 1,
        parts=-(-in_features // per_part), inputs_per_part=per_part, adapter_warps=helpers, bits=bits, steps=steps,
        bf16=int(dtype == torch.bfloat16), rows=rows, blocks=tiles, warps=warps,
    )  # fmt: skip
    while made.warps:
        made.bytes = device.library.eora_few_rows_bytes(ctypes.byref(made))
        if 0 < made.bytes <= device.memory:
            break
        made.warps //= 2
    return made


class _Bound(ctypes.Structure):
    """All that a launch needs but x, y and weights: ``FewRowsBound`` of the sources."""

    _fields_ = (("linears", ctypes.c_void_p), ("plan", Plan), *pointers("workspace", "stream"), *integers("device"))


class FewRows:
    """Weights of a `StackedLinears` as the launch reads them; keeps their tensors alive.

    Args:
        stacked: that `serves` says yes to.
        device: where they are.
    """

    def __init__(self, stacked: StackedLinears, device: Device) -> None:
        self._stacked, self._device = stacked, device
        self._linears = described(stacked)
        self._in_features = stacked.in_features
        self._outs = tuple(qweight.shape[1] for qweight in stacked.qweights)
        self._launch = getattr(device.library, f"eora_few_rows_{len(self._outs)}")
        self._bound: dict[tuple[int, torch.dtype, int], tuple[_Bound, int]] = {}
        self._workspaces = Workspaces(COUNTERS + MOST_ROWS * MOST_PARTS * self._linears.components)

    def __call__(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> list[torch.Tensor] | None:
        """y of each module, … × out in x's dtype; None where the launch does not serve x.

        Args:
            x: … × in, on the weights' device.
            weights: rows × members, float32; None weighs all components by 1.

        Raises:
            RuntimeError: where CUDA refuses the launch.
        """
        rows = x.numel() // self._in_features
        address = x.data_ptr()
        if not 0 < rows <= MOST_ROWS or x.dtype not in HALF or address % ALIGNMENT or not x.is_contiguous():
            return None
        place, stream = place_of(x.get_device())
        # What was bound for a graph is not kept: the stream that it names is captured this once.
        found = self._bound.get((rows, x.dtype, place))
        if found is None:
            found = self._bind(rows, x.dtype, place, stream, x.device)
            if found is None:
                return None
        shape = x.shape[:-1]
        ys = [x.new_empty((*shape, out)) for out in self._outs]
        given = None if weights is None else weights.contiguous().data_ptr()
        fault = self._launch(found[1], address, given, *[y.data_ptr() for y in ys])
        if fault:
            raise RuntimeError(f"CUDA refuses the launch for {rows} rows: error {fault}.")
        return ys

    def _bind(
        self, rows: int, dtype: torch.dtype, place: int, stream: int, device: torch.device
    ) -> tuple[_Bound, int] | None:
        """What a launch needs, and its address; None where it cannot be."""
        made = plan(self._stacked, rows, dtype, self._device)
        workspace = self._workspaces.at(place, device)
        if workspace is None or not made.warps:
            return None
        bound = _Bound(
            linears=ctypes.addressof(self._linears), plan=made, workspace=workspace.data_ptr(), stream=stream,
            device=-1 if device.index is None else device.index,
        )  # fmt: skip
        found = bound, ctypes.addressof(bound)
        if place != CAPTURED:
            self._bound[rows, dtype, place] = found
        return found
