"""Repacked factors give back what they were made from, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.formats.factors import Factors, QuantizedFactor
from gptqmodel_eora_ext.kernels.cpu.factors import repack_factors, unpack_factors
from gptqmodel_eora_ext.solve.quantized import quantize_factor


def same_bits(one: torch.Tensor | QuantizedFactor, other: torch.Tensor | QuantizedFactor) -> bool:
    if isinstance(one, QuantizedFactor):
        assert isinstance(other, QuantizedFactor)
        alike = (one.bits, one.features) == (other.bits, other.features)
        return alike and same_bits(one.codes, other.codes) and same_bits(one.scales, other.scales)
    assert isinstance(other, torch.Tensor)
    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(first, second)


def random(
    kind: int | torch.dtype, rank: int, features: int, generator: torch.Generator
) -> torch.Tensor | QuantizedFactor:
    values = torch.randn(rank, features, generator=generator)
    return quantize_factor(values, kind) if isinstance(kind, int) else values.to(kind)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from([8, 4, torch.float16, torch.bfloat16, torch.float32]),
    rank=st.integers(1, 40),
    in_features=st.integers(1, 200),
    out_features=st.integers(1, 200),
    seed=st.integers(0, 5),
)
def test_any_factors(kind: int | torch.dtype, rank: int, in_features: int, out_features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = Factors(random(kind, rank, in_features, generator), random(kind, rank, out_features, generator))
    repacked = repack_factors(factors)
    found = unpack_factors(repacked)
    assert repacked.complete and repacked.packed == found.packed == isinstance(kind, int)
    assert same_bits(found.down, factors.down) and same_bits(found.up, factors.up)


def test_values_that_are_no_numbers() -> None:
    odd = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-7, -1e-7]], dtype=torch.float16)
    found = unpack_factors(repack_factors(Factors(odd, odd)))
    assert same_bits(found.down, odd) and same_bits(found.up, odd)


def test_what_cannot_be_given_back_says_so() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    assert not repack_factors(Factors(wide, wide)).complete
    assert torch.equal(unpack_factors(repack_factors(Factors(wide, wide))).dense()[0], wide.float())
    fine = quantize_factor(torch.randn(3, 7, generator=generator), 4)
    codes = fine.codes.clone()
    codes[1, -1] ^= 0x10  # the half of a byte that no feature fills
    assert repack_factors(Factors(fine, fine)).complete
    assert not repack_factors(Factors(fine, replace(fine, codes=codes))).complete


@pytest.mark.parametrize("kind", [8, 4, torch.float16])
def test_they_take_their_bytes_once(kind: int | torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = Factors(random(kind, 16, 256, generator), random(kind, 16, 512, generator))
    tensors = [factors.down, factors.up]
    held = sum(one.nbytes for one in tensors)
    assert repack_factors(factors).nbytes == held
