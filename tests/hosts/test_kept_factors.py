"""An adapter's factors lie in memory once, and are had back bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.adapter.folder import ReadFactors
from gptqmodel_eora_ext.formats.factors import Factors, QuantizedFactor
from gptqmodel_eora_ext.formats.packed_weights import PackedWeight
from gptqmodel_eora_ext.hosts.gptqmodel.fused import EoRAFusedLinear
from gptqmodel_eora_ext.kernels.cpu.build import library
from gptqmodel_eora_ext.kernels.cpu.factors import RepackedFactors
from tests.hosts.test_fused import close, expected, module
from tests.kernels.cases import packed_weight, random_factors, random_input
from tests.kernels.test_unpack_factors import same_bits

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")
RANK = 6
# 96 inputs are filled up to 128 where A is repacked, 128 are not, and then A shares its memory.
WIDTHS = [96, 128]
FACTOR_BITS = [16, 8, 4]


def loaded(in_features: int, factor_bits: int) -> tuple[EoRAFusedLinear, PackedWeight, Factors]:
    """A kernel whose factors were read from a file, and copies of what it was given."""
    weight = packed_weight(2, 40, in_features, 32)
    kernel = module(weight, adapter=False)
    attach(kernel.adapter, factors := random_factors(weight, RANK, factor_bits))
    return kernel, weight, copy.deepcopy(factors)


def attach(adapter: EoRA, factors: Factors) -> None:
    if isinstance(factors.down, QuantizedFactor) and isinstance(factors.up, QuantizedFactor):
        read = ReadFactors(factors.down.dequantize(), factors.up.dequantize().T, (factors.down, factors.up))
    else:
        read = ReadFactors(factors.down, factors.up.T)
    adapter.attach(read, torch.device("cpu"))


def lies_once(kernel: EoRAFusedLinear) -> bool:
    """Whether the adapter has what the kernel reads, and nothing else."""
    lora_A, lora_B, form = kernel.adapter.stored()
    return lora_A is None and lora_B is None and form is kernel._made.layer.cpu.factors


def given_back(adapter: EoRA, factors: Factors) -> bool:
    down, up = (one.dequantize() if isinstance(one, QuantizedFactor) else one for one in (factors.down, factors.up))
    if factors.packed:
        assert adapter.packed and all(map(same_bits, adapter.packed, (factors.down, factors.up)))
    return same_bits(adapter.lora_A.T, down) and same_bits(adapter.lora_B, up)


@pytest.mark.parametrize("factor_bits", FACTOR_BITS)
@pytest.mark.parametrize("in_features", WIDTHS)
@torch.no_grad()
def test_they_are_given_up_and_had_back(in_features: int, factor_bits: int) -> None:
    kernel, weight, factors = loaded(in_features, factor_bits)
    x = random_input(3, in_features)
    y = kernel(x)
    assert lies_once(kernel) and kernel.adapter.has_factors and not kernel.adapter.trained
    assert given_back(kernel.adapter, factors) and close(y, expected(kernel, weight, x))
    assert lies_once(kernel)  # they were only looked at
    state = kernel.state_dict()
    for other in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel)), kernel.to("cpu"), kernel.float(), kernel):
        assert torch.equal(other(x), y) and lies_once(other) and given_back(other.adapter, factors)
    kernel.load_state_dict(state)
    assert torch.equal(kernel(x), y) and lies_once(kernel)


@pytest.mark.parametrize("factor_bits", FACTOR_BITS)
@torch.no_grad()
def test_copies_hold_them_as_they_were_stored(factor_bits: int) -> None:
    """A pickle that another machine opens does not depend on the order of the kernels."""
    kernel, _, factors = loaded(96, factor_bits)
    kernel(random_input(1, 96))
    held = kernel.adapter.__getstate__()
    assert isinstance(kernel.adapter.form, RepackedFactors) and isinstance(held["_form"], Factors)
    assert not any(isinstance(one, RepackedFactors) for one in held.values())
    lora_B = kernel.adapter.lora_B
    lora_B.mul_(2)
    other = copy.deepcopy(kernel.adapter)
    assert torch.equal(other.lora_B, lora_B) and other.lora_B is not lora_B and other.packed is None
    assert given_back(loaded(96, factor_bits)[0].adapter, factors)


@pytest.mark.parametrize("factor_bits", FACTOR_BITS)
@torch.no_grad()
def test_what_was_asked_for_may_be_written_to(factor_bits: int) -> None:
    kernel, weight, factors = loaded(128, factor_bits)
    x = random_input(2, 128)
    for ask in (lambda adapter: adapter.lora_B, lambda adapter: adapter.lora_A, lambda adapter: adapter.lora_B[:2]):
        attach(kernel.adapter, factors)
        kernel(x)
        one = ask(kernel.adapter)
        for _ in range(2):
            kernel(x)
            one.mul_(2)
            assert close(kernel(x), expected(kernel, weight, x)) and kernel.adapter.packed is None
        assert ask(kernel.adapter).data_ptr() == one.data_ptr()
    attach(kernel.adapter, factors)
    kernel(x)
    kernel.adapter.lora_A = kernel.adapter.lora_A * 2
    assert close(kernel(x), expected(kernel, weight, x)) and kernel.adapter.packed is None


@pytest.mark.parametrize("factor_bits", FACTOR_BITS)
@torch.no_grad()
def test_an_adapter_is_replaced_and_removed(factor_bits: int) -> None:
    kernel, weight, factors = loaded(96, factor_bits)
    x = random_input(2, 96)
    y, first = kernel(x), kernel.adapter
    other = random_factors(weight, RANK + 2, factor_bits, seed=8)
    kernel.adapter = EoRA(rank=RANK + 2)
    attach(kernel.adapter, other)
    assert close(kernel(x), expected(kernel, weight, x)) and lies_once(kernel) and given_back(kernel.adapter, other)
    assert not torch.equal(kernel(x), y)
    kernel.adapter = None
    assert close(kernel(x), expected(kernel, weight, x))
    kernel.adapter = first
    assert torch.equal(kernel(x), y) and given_back(first, factors)
    attach(first, other)
    assert close(kernel(x), expected(kernel, weight, x)) and lies_once(kernel) and given_back(first, other)


@pytest.mark.parametrize("factor_bits", FACTOR_BITS)
def test_the_torch_path_and_training_have_them(factor_bits: int) -> None:
    kernel, weight, factors = loaded(96, factor_bits)
    x = random_input(2, 96)
    kernel(x)
    with torch.no_grad():
        added = kernel.adapter.apply(x=x.double(), out=torch.zeros(2, 40, dtype=torch.float64))
        down, up = factors.dense(torch.float64)
        assert torch.allclose(added, x.double() @ down.T @ up) and lies_once(kernel)
    kernel.adapter.lora_B.requires_grad_()
    kernel(x).sum().backward()
    assert kernel.adapter.trained and kernel.adapter.lora_B.grad is not None
    inputs = x.clone().requires_grad_()
    kernel, weight, _ = loaded(96, factor_bits)
    kernel(inputs).sum().backward()
    dense = expected(kernel, weight, torch.eye(96)) - kernel.bias.double()
    assert close(inputs.grad[0], dense.sum(1))


@torch.no_grad()
def test_factors_that_cannot_be_had_back_are_kept() -> None:
    kernel, weight, _ = loaded(96, 16)
    generator = torch.Generator().manual_seed(3)
    wide = Factors(*(torch.randn(RANK, n, generator=generator, dtype=torch.float64) * 0.1 for n in (96, 40)))
    attach(kernel.adapter, wide)
    x = random_input(2, 96)
    assert close(kernel(x), expected(kernel, weight, x)) and isinstance(kernel.adapter.form, Factors)
    assert given_back(kernel.adapter, wide)


@torch.no_grad()
def test_who_goes_over_a_model_holds_one_adapter_at_a_time() -> None:
    kernels = [loaded(96, 16)[0] for _ in range(4)]
    assert all(hasattr(kernel.adapter, "lora_B") for kernel in kernels)
    assert [kernel.adapter._floats[1] is None for kernel in kernels] == [True, True, True, False]
    held = [kernel.adapter.lora_B for kernel in kernels]
    assert all(kernel.adapter.lora_B is one for kernel, one in zip(kernels, held, strict=True))


@torch.no_grad()
def test_tensors_that_somebody_set_stay_theirs() -> None:
    kernel, weight, factors = loaded(96, 16)
    down, up = factors.dense(torch.float16)
    mine: Any = down.T.clone(), up.clone()
    kernel.adapter.lora_A, kernel.adapter.lora_B = mine
    x = random_input(2, 96)
    kernel(x)
    assert kernel.adapter.lora_A is mine[0] and kernel.adapter.lora_B is mine[1] and kernel.adapter.form is None
    mine[1].mul_(3)
    assert close(kernel(x), expected(kernel, weight, x))
