"""Packed weights in the order in which the CPU kernels read them; `csrc/linear.h` draws it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...formats.packed_weights import WORD_BITS, PackedWeight, pack_words, words
from .build import library, require_fine
from .memory import kept, zeros

# As in csrc/linear.h.
LANES = 16
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Inputs of a group that share one step when x is turned into integers.
LONGEST_SEGMENT = 1024


@dataclass(frozen=True)
class Rest:
    """What a weight's repacked form does not tell of the packed one.

    Attributes:
        group_of_segment: the group of each segment, int64.
        groups: scales per output.
        scales_dtype: dtype of the packed scales.
        g_idx_dtype: dtype of the packed g_idx; None where there was none.
        last_words: the last row of `qweight`, and the last column of `qzeros`, where codes do not fill them: what the
            other bits hold is nobody's, and is given back as it was. None where codes do.
        complete: whether the packed form can be had back: every group has an input, and zeros are of version 2.
        name: the module's, for messages.
    """

    group_of_segment: torch.Tensor
    groups: int
    scales_dtype: torch.dtype
    g_idx_dtype: torch.dtype | None
    last_words: tuple[torch.Tensor | None, torch.Tensor | None]
    complete: bool
    name: str


@dataclass(frozen=True)
class RepackedWeight:
    """A weight as the kernels read it. Sizes in `csrc/linear.h`.

    Attributes:
        codes: uint8.
        scales: float16, or the checkpoint's dtype where float16 would change values.
        zeros: uint8; None where one code means zero everywhere.
        zero: that code.
        starts: int32, first unit of each segment and the number of units.
        order: int32, the input at each place, −1 for padding; None where the place is the input.
        bits: 2, 3, 4 or 8.
        in_features: inputs.
        out_features: outputs.
        rest: what `unpack_weight` needs beside that.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    zero: int
    starts: torch.Tensor
    order: torch.Tensor | None
    bits: int
    in_features: int
    out_features: int
    rest: Rest

    @property
    def segments(self) -> int:
        return len(self.starts) - 1

    @property
    def units(self) -> int:
        return int(self.starts[-1])

    @property
    def strips(self) -> int:
        return -(-self.out_features // LANES)

    def reads_as(self, other: RepackedWeight) -> bool:
        """Whether inputs stand in the same order and segments as the other's."""
        if self.in_features != other.in_features or not torch.equal(self.starts, other.starts):
            return False
        if self.order is None or other.order is None:
            return self.order is other.order
        return torch.equal(self.order, other.order)

    @property
    def nbytes(self) -> int:
        """Bytes that a multiplication reads."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.zeros, self.order) if tensor is not None)


def repack_weight(weight: PackedWeight) -> RepackedWeight:
    """Reorder a weight, on the CPU. No value changes."""
    starts, places, group_of_segment = _segments(weight)
    units = int(starts[-1])
    strips = -(-weight.out_features // LANES)
    unit_bytes = -(-units // 2) * 192 if weight.bits == 3 else units * 32 * weight.bits
    codes = zeros(strips * unit_bytes)
    kernels = library()
    assert kernels is not None
    qweight = weight.qweight.contiguous()
    fault = kernels.eora_repack(
        qweight.data_ptr(), qweight.nbytes, places.data_ptr(), places.nbytes, weight.bits, weight.in_features,
        weight.out_features, units, codes.data_ptr(), codes.nbytes, torch.get_num_threads(),
    )  # fmt: skip
    require_fine(fault, weight.name)
    zero_codes = weight.zeros()
    zero = int(zero_codes[0, 0])
    uniform = bool((zero_codes == zero).all())
    identity = torch.arange(weight.in_features, dtype=torch.int32)
    ordered = len(places) == weight.in_features and torch.equal(places, identity)
    return RepackedWeight(
        codes=codes,
        scales=kept(strips_of(_narrow(weight.scales)[group_of_segment])),
        zeros=None if uniform else kept(_pack_zeros(strips_of(zero_codes[group_of_segment]), weight.bits)),
        zero=zero,
        starts=starts,
        order=None if ordered else places,
        bits=weight.bits,
        in_features=weight.in_features,
        out_features=weight.out_features,
        rest=_rest(weight, group_of_segment),
    )


def _rest(weight: PackedWeight, group_of_segment: torch.Tensor) -> Rest:
    filled = [features * weight.bits % WORD_BITS == 0 for features in (weight.in_features, weight.out_features)]
    return Rest(
        group_of_segment=group_of_segment,
        groups=weight.groups,
        scales_dtype=weight.scales.dtype,
        g_idx_dtype=None if weight.g_idx is None else weight.g_idx.dtype,
        last_words=(
            None if filled[0] else weight.qweight[-1:].clone(),
            None if filled[1] else weight.qzeros[:, -1:].clone(),
        ),
        complete=not weight.stores_zero_minus_one and len(group_of_segment.unique()) == weight.groups,
        name=weight.name,
    )


def unpack_weight(weight: RepackedWeight) -> dict[str, torch.Tensor]:
    """The inverse of `repack_weight`, bit for bit: `qweight`, `qzeros`, `scales` and, if there was one, `g_idx`.

    The tensors are new ones. `Rest.complete` tells whether this can be asked.
    """
    rest, bits, in_features, out_features = weight.rest, weight.bits, weight.in_features, weight.out_features
    places = torch.arange(in_features, dtype=torch.int32) if weight.order is None else weight.order
    qweight = torch.zeros(words(in_features, bits), out_features, dtype=torch.int32)
    kernels = library()
    assert kernels is not None
    fault = kernels.eora_unpack(
        qweight.data_ptr(), qweight.nbytes, places.data_ptr(), places.nbytes, bits, in_features, out_features,
        weight.units, weight.codes.data_ptr(), weight.codes.nbytes, torch.get_num_threads(),
    )  # fmt: skip
    require_fine(fault, rest.name)
    first_segment = torch.zeros(rest.groups, dtype=torch.int64)
    # Written from the last on, so that the first segment of a group stays; all of them have its scale and zero.
    for segment in range(weight.segments - 1, -1, -1):
        first_segment[rest.group_of_segment[segment]] = segment
    if weight.zeros is None:
        zeros = torch.full((rest.groups, out_features), weight.zero, dtype=torch.int32)
    else:
        by_strip = weight.zeros if bits == 8 else _from_nibbles(weight.zeros)
        zeros = from_strips(by_strip, out_features)[first_segment].to(torch.int32)
    qzeros = pack_words(zeros.T, bits).T.clone(memory_format=torch.contiguous_format)
    for packed, last in ((qweight[-1:], rest.last_words[0]), (qzeros[:, -1:], rest.last_words[1])):
        if last is not None:
            packed.copy_(last)
    found = {
        "qweight": qweight,
        "qzeros": qzeros,
        "scales": from_strips(weight.scales, out_features)[first_segment].to(rest.scales_dtype),
    }
    if rest.g_idx_dtype is not None:
        of_place = rest.group_of_segment.repeat_interleave(weight.starts.diff() * LANES).to(rest.g_idx_dtype)
        found["g_idx"] = torch.empty(in_features, dtype=rest.g_idx_dtype)
        real = places >= 0
        found["g_idx"][places[real].to(torch.int64)] = of_place[real]
    return found


def _segments(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First unit of each segment and the number of units; the input at each place; the group of each segment."""
    group = weight.group_of_input()
    sizes = torch.bincount(group, minlength=weight.groups).tolist()
    inputs = torch.argsort(group, stable=True).to(torch.int32)
    starts, pieces, groups = [0], [], []
    taken = 0
    for index, size in enumerate(sizes):
        for begin in range(0, size, LONGEST_SEGMENT):
            length = min(LONGEST_SEGMENT, size - begin)
            padded = -(-length // LANES) * LANES
            pieces.append(torch.nn.functional.pad(inputs[taken : taken + length], (0, padded - length), value=-1))
            starts.append(starts[-1] + padded // LANES)
            groups.append(index)
            taken += length
    return torch.tensor(starts, dtype=torch.int32), torch.cat(pieces), torch.tensor(groups)


def _narrow(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float16 where that is exact: a checkpoint's are, whatever the model's dtype is."""
    halves = scales.to(torch.float16)
    return halves if torch.equal(halves.to(scales.dtype), scales) else scales


def strips_of(by_output: torch.Tensor) -> torch.Tensor:
    """n × out → strips × n × 16, filled up with zeros."""
    rows, outputs = by_output.shape
    strips = -(-outputs // LANES)
    padded = torch.nn.functional.pad(by_output, (0, strips * LANES - outputs))
    return padded.view(rows, strips, LANES).transpose(0, 1).contiguous()


def from_strips(strips: torch.Tensor, outputs: int) -> torch.Tensor:
    """The inverse of `strips_of`."""
    return strips.transpose(0, 1).flatten(1)[:, :outputs]


def _pack_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    return zeros.to(torch.uint8) if bits == 8 else _nibbles(zeros.to(torch.uint8))


def _nibbles(values: torch.Tensor) -> torch.Tensor:
    """uint8, … × 16 → … × 8: even lanes in the first four bytes, odd lanes in the next."""
    lanes = values.unflatten(-1, (LANES // 4, 4))
    even, odd = (lanes[..., first] | (lanes[..., first + 2] << 4) for first in (0, 1))
    return torch.cat([even, odd], dim=-1)


def _from_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `_nibbles`."""
    even, odd = packed.unflatten(-1, (2, LANES // 4)).unbind(-2)
    return torch.stack([even & 15, odd & 15, even >> 4, odd >> 4], dim=-1).flatten(-2)
