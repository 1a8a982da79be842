"""Factors in integers: the packing, the grid, and the choice of scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.formats.factors import GROUP_SIZE, pack, unpack
from gptqmodel_eora_ext.formats.gguf.blocks import GGUF_LAYOUT
from gptqmodel_eora_ext.solve import eora, weighted_energy
from gptqmodel_eora_ext.solve.factors import balance_together
from gptqmodel_eora_ext.solve.quantized import quantize_factor, quantize_factors, stored_B


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), features=st.integers(1, 150), bits=st.sampled_from([8, 4]), seed=st.integers(0, 999))
def test_property_packing_loses_nothing(rows: int, features: int, bits: int, seed: int) -> None:
    low = -(1 << (bits - 1))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, -low, (rows, features), generator=generator, dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-features * bits // 8))
    assert torch.equal(unpack(packed, bits, features), codes)


@settings(max_examples=40, deadline=None)
@given(features=st.integers(1, 150), bits=st.sampled_from([8, 4]), seed=st.integers(0, 999))
def test_property_error_is_bounded_by_the_grid(features: int, bits: int, seed: int) -> None:
    values = torch.randn(3, features, generator=torch.Generator().manual_seed(seed))
    factor = quantize_factor(values, bits)
    back = factor.dequantize()
    assert back.shape == values.shape
    assert factor.nbytes == 3 * (-(-features * bits // 8) + 2 * -(-features // GROUP_SIZE))
    for begin in range(0, features, GROUP_SIZE):
        group, found = values[:, begin : begin + GROUP_SIZE], back[:, begin : begin + GROUP_SIZE]
        # 2^bits steps between -m and m, m the group's largest. Without clipping, rounding leaves at most half a step
        # (a little more, since scales are rounded to float16) everywhere but at the upper end, which has one step
        # less; the scale that is chosen leaves no more than that in the sum of squares.
        step = 2 * group.abs().amax(1, keepdim=True) / 2**bits
        most = step / 2 + group.abs() * 2**-10
        clipped = (group.abs() > (1 - 2.0 ** (1 - bits)) * group.abs().amax(1, keepdim=True)) * step
        assert ((found - group).square().sum(1) <= torch.maximum(most, clipped).square().sum(1)).all()


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 48), side=st.sampled_from([32, 64]), bits=st.sampled_from([8, 4]), seed=st.integers(0, 99))
def test_property_components_without_effect_are_packed_beside_the_others(
    tokens: int, side: int, bits: int, seed: int
) -> None:
    """Ranks come in whole blocks of GGUF, so that there may be more components than calibration has directions. Those
    are rounded to nothing, and no factor becomes infinite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, side, generator=generator)
    second_moment, delta = x.T @ x / tokens, 1e-3 * torch.randn(side, side, generator=generator)
    lora_A = balance_together(*eora(delta, second_moment, side))[0]
    packed_A, packed_B = quantize_factors(delta, second_moment, lora_A, bits, GGUF_LAYOUT)
    left = delta - stored_B(packed_B, GGUF_LAYOUT) @ packed_A.dequantize()
    assert weighted_energy(left, second_moment) < weighted_energy(delta, second_moment)


def test_values_on_the_grid_are_kept() -> None:
    codes = torch.arange(-8, 8).repeat(2, 4).float()
    factor = quantize_factor(codes * 0.5, 4)
    assert torch.equal(factor.dequantize(), codes * 0.5)


def test_zero_rows_stay_zero() -> None:
    values = torch.zeros(2, 70)
    values[1] = torch.linspace(-1, 1, 70)
    assert not quantize_factor(values, 4).dequantize()[0].any()


def test_importance_moves_the_error() -> None:
    values = torch.randn(1, GROUP_SIZE, generator=torch.Generator().manual_seed(0))
    values[0, 0] = 4.0
    importance = torch.ones(GROUP_SIZE)
    importance[0] = 0
    plain, weighted = quantize_factor(values, 4), quantize_factor(values, 4, importance)
    rest = slice(1, None)

    def error(factor: torch.Tensor) -> float:
        return float((factor - values)[0, rest].square().sum())

    assert error(weighted.dequantize()) < error(plain.dequantize())


def test_too_large_for_float16_scales() -> None:
    with pytest.raises(ValueError, match="too large for float16 scales"):
        quantize_factor(torch.full((1, 4), 1e9), 4)
