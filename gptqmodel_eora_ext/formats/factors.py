"""A module's factors as kernels take them: floating tensors, or 8- and 4-bit integers with a scale a group.

A factor is kept as rank rows of features: A as it is, B transposed. A row of integers is cut into groups of
`GROUP_SIZE` features (the last may be shorter), each with one scale; a component's row of A and column of B thus keep
their own scales.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .packed_weights import LayoutError, PackedWeight

# Features per scale: 4.25 bits a value at 4 bits. Other sizes were not measured.
GROUP_SIZE = 64


@dataclass(frozen=True)
class QuantizedFactor:
    """A factor in integers: value = code · scale.

    Attributes:
        codes: uint8, rows × ceil(features · bits / 8). 8 bits: two's complement. 4 bits: code + 8, two to a byte, the
            even feature in the low half; an odd last one has an empty (8, that is zero) neighbour.
        scales: float16, rows × ceil(features / GROUP_SIZE).
        bits: 8 or 4.
        features: values in a row.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    features: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> QuantizedFactor:
        """The same on ``device``."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    def integers(self) -> torch.Tensor:
        """The codes: int8, rows × features."""
        return unpack(self.codes, self.bits, self.features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows × features, in ``dtype``."""
        integers = self.integers().to(torch.float32)
        return (integers * per_feature(self.scales, self.features)).to(dtype)


def per_feature(scales: torch.Tensor, features: int) -> torch.Tensor:
    """Scales of groups, spread over the features: rows × features, float32."""
    return scales.to(torch.float32).repeat_interleave(GROUP_SIZE, dim=1)[:, :features]


def pack(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack int8 codes, rows × features, into bytes."""
    if bits == 8:
        return integers.contiguous().view(torch.uint8)
    nibbles = torch.nn.functional.pad(integers + 8, (0, integers.shape[1] % 2), value=8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack(codes: torch.Tensor, bits: int, features: int) -> torch.Tensor:
    """The int8 codes of `pack`, rows × features."""
    if bits == 8:
        return codes.view(torch.int8)
    pairs = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)[:, :features]
    return pairs.to(torch.int8) - 8


@dataclass(frozen=True)
class Factors:
    """A low-rank correction B A of a weight.

    Attributes:
        down: A, rank × in: a floating tensor, or 8- or 4-bit integers.
        up: Bᵀ, rank × out, likewise.

    Raises:
        LayoutError: from `__post_init__`, when the two ranks differ or are 0.
    """

    down: torch.Tensor | QuantizedFactor
    up: torch.Tensor | QuantizedFactor

    def __post_init__(self) -> None:
        if rows(self.down) != rows(self.up) or self.rank < 1:
            raise LayoutError(
                f"factors: A has rank {rows(self.down)} and Bᵀ rank {rows(self.up)}; both should be the same, at "
                f"least 1. A is rank × in, Bᵀ rank × out."
            )

    @property
    def rank(self) -> int:
        return rows(self.down)

    @property
    def in_features(self) -> int:
        return features(self.down)

    @property
    def out_features(self) -> int:
        return features(self.up)

    def check(self, weight: PackedWeight) -> None:
        """Raises:
        LayoutError: when the factors are for a weight of another shape.
        """
        found, expected = (self.out_features, self.in_features), (weight.out_features, weight.in_features)
        if found != expected:
            raise LayoutError(
                f"{weight.name}: factors are for out × in = {found[0]} × {found[1]}, the weight is {expected[0]} × "
                f"{expected[1]}. The adapter was made for another model."
            )

    def dense(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """A and Bᵀ in ``dtype``."""
        return to_dense(self.down, dtype), to_dense(self.up, dtype)


def rows(factor: torch.Tensor | QuantizedFactor) -> int:
    """Rank of a factor."""
    return (factor.codes if isinstance(factor, QuantizedFactor) else factor).shape[0]


def features(factor: torch.Tensor | QuantizedFactor) -> int:
    """Width of a factor."""
    return factor.features if isinstance(factor, QuantizedFactor) else factor.shape[1]


def to_dense(factor: torch.Tensor | QuantizedFactor, dtype: torch.dtype) -> torch.Tensor:
    """A factor's values in ``dtype``."""
    return factor.dequantize(dtype) if isinstance(factor, QuantizedFactor) else factor.to(dtype)
