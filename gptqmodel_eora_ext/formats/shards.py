"""Parts of a packed weight and of its factors, as tensor parallelism cuts them.

A layer that is split by its outputs (column-parallel) keeps some rows of Ŵ and of B, and all of A; one that is split by
its inputs (row-parallel) keeps some columns of Ŵ and of A, and all of B. The sum, or the concatenation, of what the
parts compute is what the whole computes.

Codes and zeros lie in streams of bits (`packed_weights`), so that a cut need not fall between two words: 3-bit codes of
100 inputs end within one. Such streams are unpacked and packed again; where cuts fall between words, words are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .factors import Factors, QuantizedFactor, to_dense
from .packed_weights import WORD_BITS, PackedWeight, pack_words

# A half-open range of outputs or inputs.
Range = tuple[int, int]


def take_outputs(weight: PackedWeight, ranges: Sequence[Range]) -> PackedWeight:
    """The rows of Ŵ in some ranges of outputs, one after the other.

    Args:
        weight: the whole weight.
        ranges: of outputs.

    Returns:
        A weight of as many outputs as the ranges hold; the inputs are the same.
    """
    if list(ranges) == [(0, weight.out_features)]:
        return weight
    whole_words = _between_words(weight.bits, ranges)
    # A zero of version 1 may have borrowed from its neighbour in the word, so that only whole words are copied.
    zeros = weight.qzeros.T if whole_words else weight.zeros().T
    return replace(
        weight,
        qweight=_columns(weight.qweight, ranges),
        scales=_columns(weight.scales, ranges),
        qzeros=(_words(zeros, weight.bits, ranges) if whole_words else pack_words(_rows(zeros, ranges), weight.bits))
        .T.contiguous(),
        out_features=sum(end - begin for begin, end in ranges),
        stores_zero_minus_one=weight.stores_zero_minus_one and whole_words,
    )


def take_inputs(weight: PackedWeight, begin: int, end: int) -> PackedWeight:
    """The columns of Ŵ of a range of inputs.

    Inputs keep their scales. Where the range does not begin and end with a group, or the inputs do not lie in the order
    of their groups, the part keeps the groups that its inputs have, and a `g_idx` of its own.

    Args:
        weight: the whole weight.
        begin: the first input.
        end: the one after the last.
    """
    if (begin, end) == (0, weight.in_features):
        return weight
    count, size = end - begin, weight.row_group_size
    if _between_words(weight.bits, [(begin, end)]):
        qweight = _words(weight.qweight, weight.bits, [(begin, end)])
    else:
        qweight = pack_words(weight.codes()[begin:end], weight.bits)
    if weight.ordered and begin % size == 0 and (end % size == 0 or end == weight.in_features):
        groups = slice(begin // size, -(-end // size))
        return replace(weight, qweight=qweight, qzeros=weight.qzeros[groups].contiguous(), in_features=count,
                       scales=weight.scales[groups].contiguous(), g_idx=None, group_size=size)  # fmt: skip
    used, g_idx = weight.group_of_input()[begin:end].unique(return_inverse=True)
    # A weight's number of groups follows from its group size, and need not be the number that is used: the largest size
    # that gives enough is taken, and the groups beside those in use, to which no input belongs, repeat the last.
    size = max(1, count // len(used))
    rows = torch.cat([used, used[-1:].expand(-(-count // size) - len(used))])
    return replace(weight, qweight=qweight, qzeros=weight.qzeros[rows].contiguous(), in_features=count,
                   scales=weight.scales[rows].contiguous(), g_idx=g_idx.to(torch.int32), group_size=size)  # fmt: skip


def take_factors(factors: Factors, *, outputs: Sequence[Range], inputs: Range) -> Factors:
    """A and B of a part: some outputs of B, some inputs of A.

    Packed factors stay packed where a range begins at a scale's first value (every 64th feature); others become
    float32, which holds their values exactly.

    Args:
        factors: of the whole layer.
        outputs: ranges of outputs, one after the other.
        inputs: a range of inputs.
    """
    down, up = _features(factors.down, [inputs]), _features(factors.up, outputs)
    if isinstance(down, QuantizedFactor) != isinstance(up, QuantizedFactor):
        # Kernels read both factors in one form.
        down, up = to_dense(down, torch.float32), to_dense(up, torch.float32)
    return Factors(down, up)


def _features(factor: torch.Tensor | QuantizedFactor, ranges: Sequence[Range]) -> torch.Tensor | QuantizedFactor:
    if not isinstance(factor, QuantizedFactor):
        return factor if list(ranges) == [(0, factor.shape[1])] else _columns(factor, ranges)
    if list(ranges) == [(0, factor.features)]:
        return factor
    begin, end = ranges[0]
    size = factor.group_size
    if len(ranges) == 1 and begin % size == 0 and (end % size == 0 or end == factor.features):
        per_byte = 8 // factor.bits
        return replace(
            factor,
            codes=factor.codes[:, begin // per_byte : -(-end // per_byte)].contiguous(),
            scales=factor.scales[:, begin // size : -(-end // size)].contiguous(),
            features=end - begin,
        )
    return _columns(to_dense(factor, torch.float32), ranges)


def _columns(tensor: torch.Tensor, ranges: Sequence[Range]) -> torch.Tensor:
    return torch.cat([tensor[:, begin:end] for begin, end in ranges], dim=1).contiguous()


def _rows(tensor: torch.Tensor, ranges: Sequence[Range]) -> torch.Tensor:
    return torch.cat([tensor[begin:end] for begin, end in ranges])


def _between_words(bits: int, ranges: Sequence[Range]) -> bool:
    """Whether all ranges of codes begin and end between two words."""
    return all(begin * bits % WORD_BITS == 0 and end * bits % WORD_BITS == 0 for begin, end in ranges)


def _words(packed: torch.Tensor, bits: int, ranges: Sequence[Range]) -> torch.Tensor:
    """The words of some ranges of codes, which lie along dimension 0."""
    per_code = [(begin * bits // WORD_BITS, end * bits // WORD_BITS) for begin, end in ranges]
    return _rows(packed, per_code).contiguous()
