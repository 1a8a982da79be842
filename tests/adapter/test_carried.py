"""Factors that go from process to process arrive as they were."""

from __future__ import annotations

import json

import pytest
import torch

from gptqmodel_eora_ext.adapter.carried import carried, received
from gptqmodel_eora_ext.adapter.factors import ModuleFactors
from gptqmodel_eora_ext.solve import quantize_factors


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rank", [0, 5])
def test_factors_arrive_as_they_were(bits: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lora_A, lora_B = torch.randn(rank, 70, generator=generator), torch.randn(40, rank, generator=generator)
    packed = None
    if bits < 16 and rank:
        packed = quantize_factors(lora_B @ lora_A, None, lora_A, bits)
        lora_A, lora_B = packed[0].dequantize(), packed[1].dequantize().T
    before = ModuleFactors(lora_A, lora_B, 8, 99, 0.1, 1 / 3, 2.5e-17, packed)
    figures, tensors = carried(before)
    after = received(json.loads(json.dumps(figures)), tensors)
    assert after.report() == before.report()
    assert torch.equal(after.lora_A, before.lora_A) and torch.equal(after.lora_B, before.lora_B)
    assert (after.packed is None) == (packed is None)
    for one, other in zip(after.packed or (), packed or (), strict=True):
        assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)
        assert (one.bits, one.features, one.group_size) == (other.bits, other.features, other.group_size)
