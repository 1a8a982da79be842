"""Factors as they are trained: what the model uses is what would be stored, and gradients go straight through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.formats.factors import QuantizedFactor, to_dense
from gptqmodel_eora_ext.formats.gguf.blocks import GGUF_LAYOUT
from gptqmodel_eora_ext.refine.factors import TrainedFactors
from gptqmodel_eora_ext.refine.linear import TrainedLinear
from gptqmodel_eora_ext.solve.quantized import quantize_factor
from tests.refine.conftest import DenseWeight


def trained(rank: int, features: tuple[int, int], bits: int, seed: int = 0) -> tuple[TrainedFactors, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = tuple(torch.randn(rank, width, generator=generator) for width in features)
    factors = TrainedFactors({"a": (pair[0], pair[1])}, bits=bits, stored_as=torch.float16, dtype=torch.float32)
    return factors, pair[0]


@given(rank=st.integers(1, 5), wide=st.integers(1, 200), tall=st.integers(1, 200), bits=st.sampled_from([4, 8, 16]),
       seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_what_is_used_is_what_is_stored(rank: int, wide: int, tall: int, bits: int, seed: int) -> None:
    factors, _ = trained(rank, (wide, tall), bits, seed)
    factors.choose_scales()
    factors.use_rounded()
    parameters = factors.parameters("a")
    assert parameters is not None
    for used, written in zip(parameters, factors.read(factors.stored(), "a"), strict=True):
        assert isinstance(written, QuantizedFactor) == (bits < 16)
        values = to_dense(written, torch.float32)
        assert torch.equal(used[:, : values.shape[1]], values)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_along_the_rank_are_those_of_gguf(bits: int) -> None:
    """A and B, out × rank, in groups of 32: what is used, what is stored, and what a layer multiplies with."""
    generator = torch.Generator().manual_seed(0)
    lora_A, lora_B = torch.randn(64, 96, generator=generator), torch.randn(40, 64, generator=generator)
    factors = TrainedFactors({"a": (lora_A, lora_B)}, bits=bits, stored_as=torch.float16, dtype=torch.float32,
                             layout=GGUF_LAYOUT)  # fmt: skip
    factors.choose_scales()
    factors.use_rounded()
    written = factors.read(factors.stored(), "a")
    for one, values in zip(written, (lora_A, lora_B), strict=True):
        assert isinstance(one, QuantizedFactor)
        expected = quantize_factor(values, bits, group_size=GGUF_LAYOUT.group_size)
        assert torch.equal(one.codes, expected.codes) and torch.equal(one.scales, expected.scales)
    parameters = factors.parameters("a")
    assert parameters is not None
    weight = DenseWeight(torch.randn(40, 96, generator=generator))
    x = torch.randn(3, 96, generator=generator)
    product = TrainedLinear(weight, parameters, along_rank=True)(x)
    down, up = (to_dense(one, torch.float32) for one in written)
    assert torch.allclose(product, x @ (weight.weight + up @ down).T, atol=1e-4)
    product.sum().backward()
    assert torch.allclose(parameters[1].grad, (x @ down.T).sum(0).expand(40, 64), atol=1e-4)  # type: ignore[arg-type]
    down_again, up_again = factors.of_master("a")
    assert torch.equal(down_again, lora_A) and torch.equal(up_again, lora_B.T)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_stored_factor_is_its_own_rounding(bits: int) -> None:
    """So the loss at the start is that of the adapter as it was."""
    _, values = trained(6, (200, 64), bits)
    stored = quantize_factor(values, bits)
    start = stored.dequantize()
    factors = TrainedFactors({"a": (start, start)}, bits=bits, stored_as=torch.float16, dtype=torch.float32)
    factors.choose_scales()
    written = factors.read(factors.stored(), "a")[0]
    assert isinstance(written, QuantizedFactor)
    assert torch.equal(written.dequantize(), start)


def test_scales_are_those_of_the_search() -> None:
    factors, values = trained(6, (200, 64), 4)
    factors.choose_scales()
    written = factors.read(factors.stored(), "a")[0]
    assert isinstance(written, QuantizedFactor)
    assert torch.equal(written.scales, quantize_factor(values, 4).scales)


def test_the_gradient_passes_the_rounding() -> None:
    factors, _ = trained(3, (70, 5), 4)
    factors.choose_scales()
    factors.use_rounded()
    parameters = factors.parameters("a")
    assert parameters is not None
    (parameters[0][:, :70] * torch.arange(70.0)).sum().backward()
    down, up = factors.split(factors.gradient)
    assert torch.equal(down, torch.arange(70.0).expand(3, 70)) and not up.any()
    # What fills a row up to whole groups has no part in it.
    assert not factors.gradient[: 3 * 2].view(3, -1)[:, 70:].any()
