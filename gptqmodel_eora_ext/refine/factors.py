"""All factors of an adapter in one tensor, as they are trained: rows of values that share a scale, 64 in our files.

    module 0, A: rank × ceil(in / 64) groups | Bᵀ: rank × ceil(out / 64) groups | module 1, A | …

In a GGUF file a group has 32 values, and B's groups run along the rank: B stands there in place of Bᵀ, out × rank / 32
groups. A row is filled up with zeros to whole groups. So one call steps, rounds or saves every factor, whatever the
ranks are.

    master      float32                      what is trained
    used        the dtype of the activations what the model multiplies with: what would be stored of the master
    gradient    the dtype of the activations of the loss at `used`, taken as that at the master (straight through)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..formats.factors import PACKED_BITS, PACKED_LAYOUT, FactorLayout, QuantizedFactor, pack
from ..solve.quantized import quantize_factor

# Groups that are rounded at a time: temporaries of 4 MB in float32.
CHUNK_GROUPS = 1 << 14


@dataclass(frozen=True)
class Stored:
    """Factors as they would be written.

    Attributes:
        values: groups × group_size: int8 codes for packed factors, else the values in the dtype they are stored in.
        scales: of each group, float16; empty for factors that are not packed.
    """

    values: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class _Place:
    """Where a factor lies: from which group on, its rows, its features, and how many of them share a scale."""

    start: int
    rows: int
    features: int
    group_size: int

    @property
    def groups(self) -> int:
        return self.rows * -(-self.features // self.group_size)

    def whole(self, flat: torch.Tensor) -> torch.Tensor:
        """A view of the factor in a tensor of all groups, its rows filled up to whole groups."""
        return flat[self.start : self.start + self.groups].view(self.rows, -1)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """A view of the factor, rows × features, in a tensor of all groups."""
        return self.whole(flat)[:, : self.features]


class TrainedFactors:
    """The factors of all modules, in float32 and in the form that the model uses.

    Args:
        factors: module → A (rank × in) and Bᵀ (rank × out); B (out × rank) where the layout's groups run along the
            rank. Ranks are at least 1.
        bits: of a stored value: 4 or 8 for packed factors, 16 otherwise.
        stored_as: dtype of factors that are stored in 16 bits.
        dtype: of the activations.
        layout: of the file that they are for.
        device: where the factors are.

    Attributes:
        layout: as it was given.
        master: groups × group_size, float32.
        used: groups × group_size, what the model multiplies with.
        gradient: groups × group_size, of the loss at ``used``.
        shares: which part of a group's largest value its scale covers, groups; packed factors alone. It is searched by
            `choose_scales`, and kept in between, since the search takes seven times as long as rounding.
    """

    def __init__(
        self,
        factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        *,
        bits: int,
        stored_as: torch.dtype,
        dtype: torch.dtype,
        layout: FactorLayout = PACKED_LAYOUT,
        device: torch.device | str = "cpu",
    ) -> None:
        self.bits, self.stored_as, self.layout = bits, stored_as, layout
        self._places: dict[str, tuple[_Place, _Place]] = {}
        count = 0
        for name, pair in factors.items():
            places = []
            for factor in pair:
                rows, features = factor.shape
                places.append(_Place(count, rows, features, layout.group_size))
                count += places[-1].groups
            self._places[name] = (places[0], places[1])
        self.master = torch.zeros(count, layout.group_size, device=device)
        self.used = torch.zeros_like(self.master, dtype=dtype)
        self.gradient = torch.zeros_like(self.used)
        self.shares = torch.ones(count, device=device)
        for name, pair in factors.items():
            for place, factor in zip(self._places[name], pair, strict=True):
                place.of(self.master).copy_(factor)

    @property
    def packed(self) -> bool:
        """Whether they are stored as integers."""
        return self.bits in PACKED_BITS

    def __len__(self) -> int:
        return len(self.master)

    def modules(self) -> Iterator[str]:
        """Names of the modules that have factors."""
        return iter(self._places)

    def parameters(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A module's factors as leaves of autograd, in `used`, rows filled up to whole groups; None without factors.

        These are A and Bᵀ, or A and B where the layout's groups run along the rank. They are views: what is written to
        `used` is what they hold, and autograd adds their gradients up in `gradient`.
        """
        places = self._places.get(name)
        if places is None:
            return None
        leaves = []
        for place in places:
            leaf = place.whole(self.used).detach().requires_grad_()
            leaf.grad = place.whole(self.gradient)
            leaves.append(leaf)
        return leaves[0], leaves[1]

    def split(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """Every factor in a tensor of all groups: each module's A (rank × in) and Bᵀ (rank × out) in turn, views."""
        for name in self._places:
            yield from self._pair(name, flat)

    def of_master(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A module's A (rank × in) and Bᵀ (rank × out) as they are trained, float32: views."""
        return self._pair(name, self.master)

    def _pair(self, name: str, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A module's A (rank × in) and Bᵀ (rank × out) in a tensor of all groups: views, whatever the layout."""
        first, second = (place.of(flat) for place in self._places[name])
        return first, second.T if self.layout.along_rank else second

    def replace(self, name: str, down: torch.Tensor, up: torch.Tensor) -> None:
        """Have a module's A (rank × in) and Bᵀ (rank × out) be these, in place of what was trained."""
        for held, factor in zip(self.of_master(name), (down, up), strict=True):
            held.copy_(factor)

    def choose_scales(self) -> None:
        """Search each group's scale anew."""
        if not self.packed:
            return
        for begin, values in self._chunks():
            rounded = quantize_factor(values, self.bits, group_size=self.layout.group_size)
            scales = rounded.scales[:, 0].to(torch.float32)
            extreme = _extreme(values)
            share = torch.where(extreme != 0, scales * _lowest(self.bits) / extreme, 1)
            self.shares[begin : begin + len(values)] = share

    def use_rounded(self) -> None:
        """Have the model use what would be stored now."""
        for begin, values in self._chunks():
            self.used[begin : begin + len(values)] = self._values(self._rounded(begin, values))

    def stored(self) -> Stored:
        """What would be written now: a copy."""
        parts = [self._rounded(begin, values) for begin, values in self._chunks()]
        return Stored(torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts]))

    def read(self, stored: Stored, name: str) -> tuple[torch.Tensor | QuantizedFactor, torch.Tensor | QuantizedFactor]:
        """A module's factors out of `stored`, on the CPU.

        Returns:
            A (rank × in) and Bᵀ (rank × out), or B (out × rank) where the layout's groups run along the rank.
        """
        first, second = (self._read(stored, place) for place in self._places[name])
        return first, second

    def _read(self, stored: Stored, place: _Place) -> torch.Tensor | QuantizedFactor:
        values = place.of(stored.values).cpu().contiguous()
        if not self.packed:
            return values
        scales = stored.scales[place.start : place.start + place.groups].view(place.rows, -1)
        return QuantizedFactor(pack(values, self.bits), scales.cpu().contiguous(), self.bits, place.features,
                               self.layout.group_size)  # fmt: skip

    def _chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        for begin in range(0, len(self), CHUNK_GROUPS):
            yield begin, self.master[begin : begin + CHUNK_GROUPS]

    def _rounded(self, begin: int, values: torch.Tensor) -> Stored:
        if not self.packed:
            return Stored(values.to(self.stored_as), torch.empty(0, dtype=torch.float16, device=values.device))
        lowest = _lowest(self.bits)
        share = self.shares[begin : begin + len(values)]
        scales = (_extreme(values) * (share / lowest)).to(torch.float16)
        # A group of zeros has the scale 0, and any number may stand in its place.
        step = torch.where(scales == 0, 1, scales).to(torch.float32)
        codes = (values / step[:, None]).round_().clamp_(lowest, -lowest - 1)
        return Stored(codes.to(torch.int8), scales)

    @staticmethod
    def _values(stored: Stored) -> torch.Tensor:
        if not len(stored.scales):
            return stored.values
        return stored.values.to(torch.float32) * stored.scales.to(torch.float32)[:, None]


def _lowest(bits: int) -> int:
    """The lowest code, on which a group's largest value lies (`solve.quantized`)."""
    return -(1 << (bits - 1))


def _extreme(values: torch.Tensor) -> torch.Tensor:
    """The value of largest size in each group, with its sign."""
    low, high = values.aminmax(dim=1)
    return torch.where(-low > high, low, high)
