"""Parts of packed weights compute what their part of the whole computes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.formats.factors import QuantizedFactor
from gptqmodel_eora_ext.formats.shards import take_factors, take_inputs, take_outputs
from gptqmodel_eora_ext.kernels.reference import dequantize, linear
from tests.kernels.cases import packed_weight, random_factors, random_input

BITS = st.sampled_from((2, 3, 4, 8))


@st.composite
def weights(draw: st.DrawFn) -> tuple[object, tuple[int, int], tuple[int, int]]:
    """A weight, and a range of its inputs and of its outputs; every second time one that falls between words."""
    step = draw(st.sampled_from((1, 32)))
    in_features, out_features = (step * draw(st.integers(2, 6 if step == 32 else 150)) for _ in range(2))
    weight = packed_weight(
        draw(BITS), out_features, in_features, draw(st.sampled_from((-1, 16, 32, 64, 100))),
        sym=draw(st.booleans()), desc_act=draw(st.booleans()), version_1=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    ranges = []
    for features in (in_features, out_features):
        begin = step * draw(st.integers(0, features // step - 1))
        ranges.append((begin, step * draw(st.integers(begin // step + 1, features // step))))
    return weight, ranges[0], ranges[1]


@settings(max_examples=60, deadline=None)
@given(weights())
def test_a_range_of_outputs_has_those_rows(case: tuple) -> None:
    weight, _, (begin, end) = case
    assert torch.equal(dequantize(take_outputs(weight, [(begin, end)])), dequantize(weight)[begin:end])


@settings(max_examples=60, deadline=None)
@given(weights())
def test_a_range_of_inputs_has_those_columns(case: tuple) -> None:
    weight, (begin, end), _ = case
    assert torch.equal(dequantize(take_inputs(weight, begin, end)), dequantize(weight)[:, begin:end])


def test_several_ranges_of_outputs_lie_one_after_the_other() -> None:
    weight = packed_weight(3, 96, 64, 32, sym=False)
    ranges = [(64, 96), (0, 5), (33, 40)]
    expected = torch.cat([dequantize(weight)[begin:end] for begin, end in ranges])
    assert torch.equal(dequantize(take_outputs(weight, ranges)), expected)


def test_a_zero_that_borrowed_from_its_neighbour_keeps_its_value() -> None:
    weight = packed_weight(4, 24, 32, 32, sym=False)
    # The zeros of a group in version 1, written as packers do: the whole word less 0x11111111, a zero of 0 among them.
    zeros = weight.zeros().clone()
    zeros[:, 3] = 0
    word = torch.zeros(weight.qzeros.shape, dtype=torch.int64)
    for place in range(24):
        word[:, place // 8] += zeros[:, place].to(torch.int64) << (4 * (place % 8))
    stored = (word - 0x11111111).to(torch.int32)
    borrowed = type(weight)(
        weight.qweight, stored, weight.scales, weight.g_idx, 4, 32, 32, 24, stores_zero_minus_one=True
    )
    assert torch.equal(borrowed.zeros(), zeros)
    for ranges in ([(2, 5)], [(8, 16)], [(0, 8), (19, 24)]):
        expected = torch.cat([zeros[:, begin:end] for begin, end in ranges], dim=1)
        assert torch.equal(take_outputs(borrowed, ranges).zeros(), expected)


@settings(max_examples=30, deadline=None)
@given(weights(), st.sampled_from((16, 8, 4)), st.integers(1, 9))
def test_shares_of_rows_and_columns_add_up(case: tuple, factor_bits: int, rank: int) -> None:
    weight, (_, cut_in), (_, cut_out) = case
    factors = random_factors(weight, rank, factor_bits)
    x = random_input(3, weight.in_features)
    expected = linear(x, weight, factors)
    outputs = [part for part in ((0, cut_out), (cut_out, weight.out_features)) if part[0] < part[1]]
    inputs = [part for part in ((0, cut_in), (cut_in, weight.in_features)) if part[0] < part[1]]
    whole_in, whole_out = (0, weight.in_features), [(0, weight.out_features)]
    by_rows = [linear(x, take_outputs(weight, [part]), take_factors(factors, outputs=[part], inputs=whole_in))
               for part in outputs]  # fmt: skip
    by_columns = [linear(x[:, part[0] : part[1]], take_inputs(weight, *part),
                         take_factors(factors, outputs=whole_out, inputs=part)) for part in inputs]  # fmt: skip
    torch.testing.assert_close(torch.cat(by_rows, dim=1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(by_columns), expected, rtol=1e-4, atol=1e-5)


def test_packed_factors_stay_packed_between_scales() -> None:
    factors = random_factors(packed_weight(2, 192, 256, 64), 8, 4)
    part = take_factors(factors, outputs=[(64, 128)], inputs=(128, 256))
    assert isinstance(part.down, QuantizedFactor) and isinstance(part.up, QuantizedFactor)
    assert torch.equal(part.down.dequantize(), factors.down.dequantize()[:, 128:])
    assert torch.equal(part.up.dequantize(), factors.up.dequantize()[:, 64:128])
    assert not take_factors(factors, outputs=[(0, 100)], inputs=(0, 256)).packed
