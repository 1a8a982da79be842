"""The layout and the oracle, against GPTQModel's own torch kernel and by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.formats.factors import Factors
from gptqmodel_eora_ext.formats.packed_weights import LayoutError, PackedWeight, pack_words, unpack_words
from gptqmodel_eora_ext.kernels.reference import dequantize, linear
from tests.kernels.cases import packed_weight, random_factors, random_input


def host_weight(weight: PackedWeight) -> torch.Tensor:
    """Ŵ as GPTQModel's torch kernel dequantises it, out × in."""
    kernel = TorchLinear(bits=weight.bits, group_size=weight.group_size, sym=False, desc_act=True,
                         in_features=weight.in_features, out_features=weight.out_features)  # fmt: skip
    kernel.load_state_dict(
        {"qweight": weight.qweight, "qzeros": weight.qzeros, "scales": weight.scales, "g_idx": weight.g_idx}
    )
    if weight.stores_zero_minus_one:
        convert_gptq_v1_to_v2_format_module(kernel, weight.bits, torch.int32)
    kernel._init_wf_unsqueeze_buffers()
    kernel.eval()
    return kernel.dequantize_weight().T


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version_1", [False, True])
@pytest.mark.parametrize(("group_size", "desc_act"), [(16, True), (64, False), (-1, False)])
def test_dequantises_as_the_host_does(bits: int, version_1: bool, group_size: int, desc_act: bool) -> None:
    weight = packed_weight(bits, 96, 128, group_size, sym=False, desc_act=desc_act, version_1=version_1)
    assert torch.equal(dequantize(weight, torch.float16), host_weight(weight))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_of_0_that_borrowed_from_its_neighbour(bits: int) -> None:
    """Writers of version 1 subtract from whole words."""
    weight = packed_weight(bits, 64, 64, 32, sym=False)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    stored = (weight.qzeros.to(torch.int64) - ones).to(torch.int32)
    assert int(weight.zeros().min()) == 0
    old = replace(weight, qzeros=stored, stores_zero_minus_one=True)
    assert torch.equal(old.zeros(), weight.zeros())


@settings(max_examples=50, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), codes=st.integers(1, 100), seed=st.integers(0, 99))
def test_packing_round_trips(bits: int, codes: int, seed: int) -> None:
    values = torch.randint(0, 1 << bits, (codes, 3), generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    assert torch.equal(unpack_words(pack_words(values, bits), bits, codes), values)


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
def test_the_sum_of_its_parts(factor_bits: int) -> None:
    weight = packed_weight(3, 40, 72, 16, sym=False)
    factors = random_factors(weight, 5, factor_bits)
    x, bias = random_input(4, 72), torch.arange(40.0)
    down, up = factors.dense(torch.float64)
    expected = x.double() @ (dequantize(weight, torch.float64) + up.T @ down).T + bias
    torch.testing.assert_close(linear(x, weight, factors, bias).double(), expected, rtol=1e-5, atol=1e-5)


def test_differentiable_by_input_and_factors() -> None:
    weight = packed_weight(2, 6, 8, 4)
    x = random_input(2, 8).double().requires_grad_()
    down, up = (torch.randn(3, width, dtype=torch.float64, requires_grad=True) for width in (8, 6))
    assert torch.autograd.gradcheck(
        lambda x, down, up: linear(x, weight, Factors(down, up), accumulate=torch.float64), (x, down, up)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"qweight": torch.zeros(3, 32, dtype=torch.int32)},
            r"layer\.q: qweight's shape should be 4 × 32, found 3 × 32",
        ),
        ({"qzeros": torch.zeros(4, 3, dtype=torch.int32)}, r"qzeros's shape should be 4 × 2, found 4 × 3"),
        ({"scales": torch.zeros(4, 32, dtype=torch.int32)}, r"scales's dtype should be one of .*, found torch\.int32"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "g_idx should be 0 to 3, found values from -1 to -1"),
        ({"g_idx": torch.arange(64)}, "g_idx should be 0 to 3, found values from 0 to 63"),
        ({"g_idx": torch.zeros(65, dtype=torch.int32)}, "g_idx's shape should be 64, found 65"),
        ({"bits": 5}, "bits should be one of 2, 3, 4, 8, found 5"),
        ({"group_size": 0}, "group_size should be a positive number"),
    ],
)
def test_a_damaged_checkpoint_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        replace(packed_weight(2, 32, 64, 16), name="layer.q", **change)


def test_factors_of_another_shape_are_refused() -> None:
    weight = packed_weight(2, 32, 64, 16)
    with pytest.raises(LayoutError, match="factors are for out × in = 48 × 64, the weight is 32 × 64"):
        linear(random_input(1, 64), weight, random_factors(packed_weight(2, 48, 64, 16), 4))
    with pytest.raises(LayoutError, match="A has rank 4 and Bᵀ rank 3"):
        Factors(torch.zeros(4, 64), torch.zeros(3, 32))
