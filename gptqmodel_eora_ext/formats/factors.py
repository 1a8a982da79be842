"""A module's factors as kernels take them: floating tensors, or 8- and 4-bit integers with a scale a group.

A factor is kept as rank rows of features: A as it is, B transposed. A row of integers is cut into groups of
`GROUP_SIZE` features (the last may be shorter), each with one scale; a component's row of A and column of B thus keep
their own scales.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .numbers import is_whole
from .packed_weights import LayoutError, PackedWeight

# Features per scale: 4.25 bits a value at 4 bits. Other sizes were not measured.
GROUP_SIZE = 64
# Widths that factors are packed in, and the floating dtypes that kernels read.
PACKED_BITS = (8, 4)
DAMAGED_ADAPTER = "The adapter is damaged or made by another version; copy it again, or make it again."
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class FactorLayout:
    """How factors lie in a file, which decides how they are rounded and what a component weighs.

    Attributes:
        group_size: values that share a scale, where factors are integers.
        along_rank: whether B's groups run along its rows, over the components; else down a column, over the features.
        multiple: integer factors have a rank that this divides.
        step: ranks on offer under a budget are multiples of this.
    """

    group_size: int
    along_rank: bool
    multiple: int
    step: int


# Ours: each component keeps its own scales, and kernels read factors in tiles of 8 or 16 components.
PACKED_LAYOUT = FactorLayout(GROUP_SIZE, along_rank=False, multiple=1, step=8)


@dataclass(frozen=True)
class QuantizedFactor:
    """A factor in integers: value = code · scale.

    Attributes:
        codes: uint8, rows × ceil(features · bits / 8). 8 bits: two's complement. 4 bits: code + 8, two to a byte, the
            even feature in the low half; an odd last one has an empty (8, that is zero) neighbour.
        scales: float16, rows × ceil(features / group_size).
        bits: 8 or 4.
        features: values in a row.
        group_size: values that share a scale.

    Raises:
        LayoutError: from `__post_init__`, for shapes or dtypes other than these.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    features: int
    group_size: int = GROUP_SIZE

    def __post_init__(self) -> None:
        check_packed("factor", self.bits, self.features, _layout(self.codes), _layout(self.scales), self.group_size)

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
        return (integers * per_feature(self.scales, self.features, self.group_size)).to(dtype)


# Shape and dtype of a tensor.
Layout = tuple[tuple[int, ...], torch.dtype]


def _layout(tensor: torch.Tensor) -> Layout:
    return tuple(tensor.shape), tensor.dtype


def check_packed(
    name: str, bits: int, features: int, codes: Layout, scales: Layout, group_size: int = GROUP_SIZE
) -> None:
    """Check that codes and scales are of a packed factor, before anything is allocated or read.

    Args:
        name: what to call the factor in a message.
        bits: of a code.
        features: values in a row.
        codes: shape and dtype of the codes.
        scales: shape and dtype of the scales.
        group_size: values that share a scale.

    Raises:
        LayoutError: when they are not; `QuantizedFactor` tells the layout.
    """

    def fail(what: str, found: object, expected: str) -> None:
        raise LayoutError(f"{name}: {what} should be {expected}, found {found}. {DAMAGED_ADAPTER}")

    if not is_whole(bits) or bits not in PACKED_BITS:
        fail("bits", bits, " or ".join(map(str, PACKED_BITS)))
    if not is_whole(features):
        fail("the number of features", features, "a positive integer")
    # An empty factor is one of rank 0, which is written as no factor at all.
    if len(codes[0]) != 2 or codes[0][0] < 1:
        fail("the shape of the codes", list(codes[0]), "rank × bytes")
    rank = codes[0][0]
    expected = (
        ("codes", codes, (rank, -(-features * bits // 8)), torch.uint8),
        ("scales", scales, (rank, -(-features // group_size)), torch.float16),
    )
    for what, (shape, dtype), wanted, wanted_dtype in expected:
        if shape != wanted:
            fail(f"the shape of the {what}", list(shape), f"{list(wanted)} for {features} features in {bits} bits")
        if dtype != wanted_dtype:
            fail(f"the dtype of the {what}", dtype, str(wanted_dtype))


def check_floating(name: str, factor: Layout) -> None:
    """Check that a factor that is not packed is a matrix of floating numbers.

    Raises:
        LayoutError: when it is not.
    """
    shape, dtype = factor
    if len(shape) != 2 or min(shape) < 1:
        raise LayoutError(f"{name}: the shape should be rank × features, found {list(shape)}. {DAMAGED_ADAPTER}")
    if dtype not in FLOATING:
        names = ", ".join(str(one)[6:] for one in FLOATING)
        raise LayoutError(f"{name}: the dtype should be one of {names}, found {dtype}. {DAMAGED_ADAPTER}")


def per_feature(scales: torch.Tensor, features: int, group_size: int = GROUP_SIZE) -> torch.Tensor:
    """Scales of groups, spread over the features: rows × features, float32."""
    return scales.to(torch.float32).repeat_interleave(group_size, dim=1)[:, :features]


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
        members: ranks of the adapters that are stacked in it, in their order, each at least 0; empty for one adapter.
            Kernels multiply the components of each by its weight (`kernels.reference.linear`).

    Raises:
        LayoutError: from `__post_init__`, when the two ranks differ or are 0, a factor is no matrix of floating
            numbers, or the members' ranks do not add up to the rank.
    """

    down: torch.Tensor | QuantizedFactor
    up: torch.Tensor | QuantizedFactor
    members: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, factor in (("A", self.down), ("Bᵀ", self.up)):
            if not isinstance(factor, QuantizedFactor):
                check_floating(f"factor {name}", _layout(factor))
        if rows(self.down) != rows(self.up) or self.rank < 1:
            raise LayoutError(
                f"factors: A has rank {rows(self.down)} and Bᵀ rank {rows(self.up)}; both should be the same, at "
                f"least 1. A is rank × in, Bᵀ rank × out."
            )
        if self.members and (min(self.members) < 0 or sum(self.members) != self.rank):
            raise LayoutError(
                f"factors: the members' ranks {list(self.members)} should add up to {self.rank}, the rank of A."
            )

    @property
    def rank(self) -> int:
        return rows(self.down)

    @property
    def packed(self) -> bool:
        """Whether they are integers."""
        return isinstance(self.down, QuantizedFactor)

    def to(self, device: torch.device | str) -> Factors:
        """The same on ``device``."""
        return replace(self, down=self.down.to(device), up=self.up.to(device))

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
