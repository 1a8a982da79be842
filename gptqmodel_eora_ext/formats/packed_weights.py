"""What the kernels take: a packed GPTQ weight and a pair of factors, checked before any kernel reads them.

A packed row of codes is a little-endian bit stream in 32-bit words: code i takes the bits [i · bits, (i + 1) · bits).
Two, four and eight bits fill words evenly; at three bits 32 codes take three words and two of them straddle words.

    qweight   int32, ceil(in · bits / 32) × out: a stream per output, along dimension 0
    qzeros    int32, groups × ceil(out · bits / 32): a stream per group, along dimension 1
    scales    float, groups × out
    g_idx     int32, in: the group of each input; i // group_size unless quantised with `desc_act`

    Ŵ[o, i] = scales[g_idx[i], o] · (code[i, o] − zero[g_idx[i], o])

Files of version 1 store zero − 1 in `qzeros`, those of version 2 the zero itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .numbers import is_whole

WEIGHT_BITS = (2, 3, 4, 8)
WORD_BITS = 32


class LayoutError(ValueError):
    """Tensors that are no packed weight, or factors that do not fit it."""


@dataclass(frozen=True)
class PackedWeight:
    """A GPTQ weight as checkpoints store it.

    Attributes:
        qweight: int32, ceil(in · bits / 32) × out.
        qzeros: int32, groups × ceil(out · bits / 32).
        scales: float16, bfloat16 or float32, groups × out.
        g_idx: integers, in; None for inputs in the order of their groups.
        bits: 2, 3, 4 or 8.
        group_size: inputs per scale; −1 for all of a row.
        in_features: inputs.
        out_features: outputs.
        stores_zero_minus_one: whether `qzeros` is of version 1.
        name: the module's name, for messages.

    Raises:
        LayoutError: from `__post_init__`, for shapes, dtypes or group indices that do not belong together.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor | None
    bits: int
    group_size: int
    in_features: int
    out_features: int
    stores_zero_minus_one: bool = False
    name: str = "weight"

    def __post_init__(self) -> None:
        if not is_whole(self.bits) or self.bits not in WEIGHT_BITS:
            self._fail("bits", self.bits, f"one of {', '.join(map(str, WEIGHT_BITS))}")
        if self.group_size != -1 and not is_whole(self.group_size):
            self._fail("group_size", self.group_size, "a positive number, or -1 for a whole row")
        if not is_whole(self.in_features) or not is_whole(self.out_features):
            self._fail("out × in", f"{self.out_features} × {self.in_features}", "at least 1 × 1")
        self._check("qweight", self.qweight, (words(self.in_features, self.bits), self.out_features), (torch.int32,))
        self._check("qzeros", self.qzeros, (self.groups, words(self.out_features, self.bits)), (torch.int32,))
        self._check("scales", self.scales, (self.groups, self.out_features),
                    (torch.float16, torch.bfloat16, torch.float32))  # fmt: skip
        if self.g_idx is not None:
            self._check("g_idx", self.g_idx, (self.in_features,), (torch.int32, torch.int64))
            if not self.g_idx.is_meta:
                lowest, highest = (int(value) for value in self.g_idx.aminmax())
                if lowest < 0 or highest >= self.groups:
                    self._fail("g_idx", f"values from {lowest} to {highest}", f"0 to {self.groups - 1}")

    def _check(self, what: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        if tuple(tensor.shape) != shape:
            self._fail(f"{what}'s shape", " × ".join(map(str, tensor.shape)), " × ".join(map(str, shape)))
        if tensor.dtype not in dtypes:
            self._fail(f"{what}'s dtype", tensor.dtype, f"one of {', '.join(map(str, dtypes))}")

    def _fail(self, what: str, found: object, expected: str) -> None:
        raise LayoutError(
            f"{self.name}: {what} should be {expected}, found {found}. The checkpoint is damaged, or its "
            f"quantize_config.json tells other bits or another group size than its tensors have."
        )

    @property
    def row_group_size(self) -> int:
        """Inputs per scale; in_features for −1, and where a group is larger than the row."""
        return self.in_features if self.group_size == -1 else min(self.group_size, self.in_features)

    @property
    def groups(self) -> int:
        """Scales per output; the last group may be shorter."""
        return -(-self.in_features // self.row_group_size)

    @property
    def ordered(self) -> bool:
        """Whether inputs lie in the order of their groups, `group_size` to each."""
        return self.g_idx is None or torch.equal(self.g_idx.to(torch.int64), self._usual_groups())

    def _usual_groups(self) -> torch.Tensor:
        return torch.arange(self.in_features, device=self.qweight.device) // self.row_group_size

    def group_of_input(self) -> torch.Tensor:
        """The group of each input: int64, in."""
        return self._usual_groups() if self.g_idx is None else self.g_idx.to(torch.int64)

    def codes(self) -> torch.Tensor:
        """The integers of the weight: int32, in × out."""
        return unpack_words(self.qweight, self.bits, self.in_features)

    def zeros(self) -> torch.Tensor:
        """The code that means zero: int32, groups × out, 0 to 2^bits − 1."""
        stored = self.qzeros
        if self.stores_zero_minus_one and self.bits != 3:
            # Writers subtract from whole words, so that a zero of 0 borrows from its neighbour; this pays it back.
            ones = sum(1 << shift for shift in range(0, WORD_BITS, self.bits))
            stored = (stored.to(torch.int64) + ones).to(torch.int32)
        zeros = unpack_words(stored.T, self.bits, self.out_features).T
        if self.stores_zero_minus_one and self.bits == 3:
            zeros = (zeros + 1) & 7
        return zeros.contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of codes, zeros and scales."""
        return self.qweight.nbytes + self.qzeros.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same on ``device``."""
        moved = {name: getattr(self, name).to(device) for name in ("qweight", "qzeros", "scales")}
        return replace(self, **moved, g_idx=None if self.g_idx is None else self.g_idx.to(device))


def words(codes: int, bits: int) -> int:
    """32-bit words that a stream of so many codes takes."""
    return -(-codes * bits // WORD_BITS)


def unpack_words(packed: torch.Tensor, bits: int, codes: int) -> torch.Tensor:
    """The codes of streams along dimension 0: int32 words × n → int32 codes × n."""
    unsigned = packed.to(torch.int64) & 0xFFFFFFFF
    following = torch.cat([unsigned[1:], torch.zeros_like(unsigned[:1])])
    start = torch.arange(codes, device=packed.device) * bits
    word, shift = start // WORD_BITS, (start % WORD_BITS)[:, None]
    pair = unsigned[word] >> shift
    if bits == 3:
        pair |= (following[word] << 1) << (WORD_BITS - 1 - shift)
    return (pair & ((1 << bits) - 1)).to(torch.int32)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `unpack_words`: integers codes × n → int32 words × n, the last word filled up with zeros."""
    count = words(codes.shape[0], bits)
    packed = torch.zeros(count + 1, codes.shape[1], dtype=torch.int64, device=codes.device)
    start = torch.arange(codes.shape[0], device=codes.device) * bits
    shifted = (codes.to(torch.int64) & ((1 << bits) - 1)) << (start % WORD_BITS)[:, None]
    packed.index_add_(0, start // WORD_BITS, shifted & 0xFFFFFFFF)
    packed.index_add_(0, start // WORD_BITS + 1, shifted >> WORD_BITS)
    return packed[:count].to(torch.int32)
