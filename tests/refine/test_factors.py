"""Factors as they are trained: what the model uses is what would be stored, and gradients go straight through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.formats.factors import QuantizedFactor, to_dense
from gptqmodel_eora_ext.refine.factors import TrainedFactors
from gptqmodel_eora_ext.solve.quantized import quantize_factor


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
