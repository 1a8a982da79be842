"""Low-rank factors in the order in which the CPU kernels read them; `csrc/linear.h` draws it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...formats.factors import Factors, QuantizedFactor, pack
from .memory import kept
from .repack import KINDS, LANES, from_strips, strips_of

# As in csrc/linear.h.
FACTOR_GROUP = 64
BLOCK = 8
INTEGER_KINDS = {8: 3, 4: 4}


@dataclass(frozen=True)
class RepackedFactors:
    """Factors as the kernels read them.

    Attributes:
        down: A, rank × in rounded up to `FACTOR_GROUP`; of 4-bit codes all bytes of its strips, one after the other.
        down_scales: float16, rank × groups, of 4-bit codes in strips; None for floating factors.
        up: Bᵀ, strips × rank × 16; of 4-bit codes strips × blocks of 8 components × 64.
        up_scales: float16, groups × rank; None for floating factors.
        down_kind: dtype of A as csrc/linear.h numbers them.
        up_kind: dtype of Bᵀ.
        rank: components.
        in_features: inputs.
        out_features: outputs.
        complete: whether `unpack_factors` gives back what they were made from, to the last bit.
        members: as of `Factors`.
    """

    down: torch.Tensor
    down_scales: torch.Tensor | None
    up: torch.Tensor
    up_scales: torch.Tensor | None
    down_kind: int
    up_kind: int
    rank: int
    in_features: int
    out_features: int
    complete: bool
    members: tuple[int, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether they are integers."""
        return self.down_kind in INTEGER_KINDS.values()

    @property
    def nbytes(self) -> int:
        """Bytes that a multiplication reads."""
        tensors = (self.down, self.down_scales, self.up, self.up_scales)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def repack_factors(factors: Factors) -> RepackedFactors:
    """Reorder factors, on the CPU. No value changes."""
    down, down_scales, down_kind = _numbers(factors.down)
    factor_memory = down.data_ptr()
    up, up_scales, up_kind = _numbers(factors.up)
    padding = -factors.in_features % FACTOR_GROUP
    if padding:  # padding by nothing would copy all of it
        down = torch.nn.functional.pad(down, (0, padding))
    down = down.contiguous()
    up = strips_of(up)
    if down_kind == INTEGER_KINDS[4]:
        assert down_scales is not None
        down = torch.cat([_blocks(part).flatten() for part in _in_strips(down)])
        down_scales = torch.cat([part.flatten() for part in _in_strips(down_scales)])
    if up_kind == INTEGER_KINDS[4]:
        up = _blocks(up)
    return RepackedFactors(
        # Where nothing was changed, the adapter holds the very same memory.
        down=down if down.data_ptr() == factor_memory else kept(down),
        down_scales=down_scales,
        up=kept(up),
        up_scales=None if up_scales is None else up_scales.T.contiguous(),
        down_kind=down_kind,
        up_kind=up_kind,
        rank=factors.rank,
        in_features=factors.in_features,
        out_features=factors.out_features,
        complete=_restorable(factors.down) and _restorable(factors.up),
        members=factors.members,
    )


def _restorable(factor: torch.Tensor | QuantizedFactor) -> bool:
    if isinstance(factor, QuantizedFactor):
        # The last half of a byte that no feature fills should say zero, as writers have it; here it does in any case.
        odd = factor.bits == 4 and factor.features % 2 == 1
        return not odd or bool((factor.codes[:, -1] >> 4 == 8).all())
    return factor.dtype in KINDS


def unpack_factors(factors: RepackedFactors) -> Factors:
    """The inverse of `repack_factors`, bit for bit; `RepackedFactors.complete` tells whether this can be asked.

    Floating factors that are not `complete` were float64 and come back rounded to float32. A may share the memory of
    the repacked one; nobody may write to it.
    """
    return Factors(unpack_down(factors), _unpack_up(factors), factors.members)


def unpack_down(factors: RepackedFactors) -> torch.Tensor | QuantizedFactor:
    """A alone, as `unpack_factors`."""
    values, scales, rank = factors.down, factors.down_scales, factors.rank
    if factors.down_kind == INTEGER_KINDS[4]:
        assert scales is not None
        values = _from_strips_of_down(values, rank, blocks=True)
        scales = _from_strips_of_down(scales, rank, blocks=False)
    return _factor(values[:, : factors.in_features].contiguous(), scales, factors.down_kind)


def _unpack_up(factors: RepackedFactors) -> torch.Tensor | QuantizedFactor:
    columns = factors.up
    if factors.up_kind == INTEGER_KINDS[4]:
        columns = _from_blocks(columns)[:, : factors.rank]
    values = from_strips(columns, factors.out_features)
    scales = None if factors.up_scales is None else factors.up_scales.T
    return _factor(values.contiguous(), scales, factors.up_kind)


def _numbers(factor: torch.Tensor | QuantizedFactor) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Values or codes, scales, and the kind."""
    if isinstance(factor, QuantizedFactor):
        return factor.integers(), factor.scales.contiguous(), INTEGER_KINDS[factor.bits]
    # The kernels have no float64; their sums are float32 in any case.
    values = factor.detach() if factor.dtype in KINDS else factor.detach().to(torch.float32)
    return values, None, KINDS[values.dtype]


def _factor(values: torch.Tensor, scales: torch.Tensor | None, kind: int) -> torch.Tensor | QuantizedFactor:
    """The inverse of `_numbers`."""
    if scales is None:
        return values
    bits = next(bits for bits, number in INTEGER_KINDS.items() if number == kind)
    return QuantizedFactor(pack(values, bits), scales.contiguous(), bits, values.shape[1])


def _in_strips(of_components: torch.Tensor) -> list[torch.Tensor]:
    """rank × n → strips × n × 16 and, where 8 components at most are left, 1 × n × 8; filled up with zeros."""
    columns = torch.nn.functional.pad(of_components.T, (0, -len(of_components) % BLOCK))
    whole = columns.shape[1] // LANES * LANES
    return [part for part in (strips_of(columns[:, :whole]), columns[None, :, whole:]) if part.numel()]


def _from_strips_of_down(flat: torch.Tensor, rank: int, *, blocks: bool) -> torch.Tensor:
    """What `_in_strips` was given, from its parts one after the other: scales, or codes in `_blocks`."""
    padded = -(-rank // BLOCK) * BLOCK
    whole, columns = padded // LANES * LANES, []
    for part, lanes in zip(flat.unflatten(0, (padded, -1)).split([whole, padded - whole]), (LANES, BLOCK), strict=True):
        if len(part):
            strips = part.reshape(len(part) // lanes, -1, lanes * (BLOCK // 2 if blocks else 1))
            columns.append(from_strips(_from_blocks(strips) if blocks else strips, len(part)))
    return torch.cat(columns, dim=1).T[:rank].clone(memory_format=torch.contiguous_format)


def _blocks(columns: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits, n × count × lanes, to bytes, n × blocks × 4 · lanes: a lane's four bytes hold eight of count."""
    codes = torch.nn.functional.pad((columns + 8).to(torch.uint8), (0, 0, 0, -columns.shape[1] % BLOCK), value=8)
    low, high = codes.unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return (low | high << 4).transpose(-1, -2).flatten(2)


def _from_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """The inverse of `_blocks`, with what count was filled up by."""
    both = blocks.unflatten(2, (-1, BLOCK // 2)).transpose(-1, -2)
    return torch.stack([both & 15, both >> 4], dim=2).flatten(1, 3).to(torch.int8) - 8
