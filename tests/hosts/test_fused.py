"""The fused kernel inside GPTQModel: what selects it, and what a module must survive."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel import BACKEND
from gptqmodel.models._const import DEVICE
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import FORMAT, METHOD
from gptqmodel.utils.importer import clear_validation_cache, select_quant_linear

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.adapter.folder import ReadFactors
from gptqmodel_eora_ext.formats.packed_weights import LayoutError, PackedWeight
from gptqmodel_eora_ext.hosts.gptqmodel.fused import EoRAFusedLinear
from gptqmodel_eora_ext.kernels import dispatch
from gptqmodel_eora_ext.kernels.cpu import build
from gptqmodel_eora_ext.kernels.cpu.factors import BLOCK
from gptqmodel_eora_ext.kernels.reference import linear
from tests.kernels.cases import packed_weight, random_factors, random_input

RANK = 6
needs_kernels = pytest.mark.skipif(build.library() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def fresh_selection() -> Iterator[None]:
    """What the host remembers of a kernel's validation does not count across tests."""
    yield
    clear_validation_cache()
    EoRAFusedLinear.cached_validate_once.cache_clear()


def select(**options: Any) -> Any:
    settings: dict[str, Any] = {
        "bits": 2, "group_size": 64, "desc_act": False, "sym": True, "device": DEVICE.CPU, "backend": BACKEND.AUTO,
        "format": FORMAT.GPTQ, "quant_method": METHOD.GPTQ, "pack": False, "pack_dtype": torch.int32,
        "adapter": EoRA(rank=4), "dtype": torch.bfloat16,
    }  # fmt: skip
    return select_quant_linear(**{**settings, **options})


def module(weight: PackedWeight, *, adapter: bool = True, bias: bool = True) -> EoRAFusedLinear:
    """The kernel with a weight and an adapter, as a loaded model holds it."""
    kernel = EoRAFusedLinear(bits=weight.bits, group_size=weight.group_size, sym=False, desc_act=True, name="layer.q",
                             in_features=weight.in_features, out_features=weight.out_features, bias=bias,
                             adapter=EoRA(rank=RANK, path="unread"))  # fmt: skip
    state = {"qweight": weight.qweight, "qzeros": weight.qzeros, "scales": weight.scales, "g_idx": weight.g_idx}
    if bias:
        state["bias"] = torch.randn(weight.out_features, generator=torch.Generator().manual_seed(5)).half()
    kernel.load_state_dict(state)
    kernel.adapter.path = None
    if adapter:
        down, up = random_factors(weight, RANK).dense(torch.float16)
        kernel.adapter.lora_A, kernel.adapter.lora_B = down.T, up
    kernel.post_init()
    return kernel.eval()


def expected(kernel: EoRAFusedLinear, weight: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    y = linear(x.double(), weight, None, kernel.bias, accumulate=torch.float64)
    if kernel.adapter is not None and kernel.adapter.lora_A is not None:
        y += x.double() @ kernel.adapter.lora_A.double() @ kernel.adapter.lora_B.double()
    return y


def close(y: torch.Tensor, wanted: torch.Tensor) -> bool:
    y, wanted = y.detach(), wanted.detach()
    return float((y.double() - wanted).norm()) < 2e-6 * float(wanted.norm())


# Selection -------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", [FORMAT.GPTQ, FORMAT.GPTQ_V2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_eora_adapter_on_a_cpu_gets_it(bits: int, form: FORMAT, dtype: torch.dtype) -> None:
    assert select(bits=bits, format=form, dtype=dtype) is EoRAFusedLinear


def test_nobody_else_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select(adapter=None) is not EoRAFusedLinear
    assert select(backend=BACKEND.GPTQ_TORCH) is TorchLinear
    assert select(pack=True) is not EoRAFusedLinear
    assert select(bits=5) is not EoRAFusedLinear
    monkeypatch.setenv(dispatch.SWITCH, dispatch.ALL)
    clear_validation_cache()
    assert select(adapter=EoRA(rank=4)) is TorchLinear


def test_without_a_compiler_there_is_one_log_line_and_the_torch_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.library.cache_clear()
    EoRAFusedLinear.cached_validate_once.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger=build.__name__):
            assert select() is TorchLinear
            assert select(bits=3) is TorchLinear
            assert dispatch.choose("cpu", torch.float32, 2, 1).path == dispatch.TORCH
        messages = [record.message for record in caplog.records if record.name == build.__name__]
        assert len(messages) == 1 and "no-such-compiler" in messages[0] and "--build" in messages[0]
    finally:
        build.library.cache_clear()


# The module ------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("rows", [(1,), (2, 3), (40,)])
def test_forward_keeps_the_shape_of_its_input(rows: tuple[int, ...]) -> None:
    weight = packed_weight(3, 40, 96, 32, sym=False, desc_act=True)
    kernel, x = module(weight), random_input(torch.Size(rows).numel(), 96).view(*rows, 96)
    assert close(kernel(x), expected(kernel, weight, x)) and kernel(x).shape == (*rows, 40)


@needs_kernels
def test_an_input_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer\.q: x should be … × 32, found 2 × 48"):
        module(packed_weight(2, 16, 32, 32))(torch.zeros(2, 48))


@needs_kernels
def test_without_factors_and_without_adapter() -> None:
    weight, x = packed_weight(2, 40, 96, 32), random_input(3, 96)
    kernel = module(weight, adapter=False)
    assert close(kernel(x), expected(kernel, weight, x))
    kernel = module(weight)
    with_adapter = kernel(x)
    adapter, kernel.adapter = kernel.adapter, None
    assert close(kernel(x), expected(kernel, weight, x)) and not torch.equal(kernel(x), with_adapter)
    kernel.adapter = adapter
    assert torch.equal(kernel(x), with_adapter)


@needs_kernels
@pytest.mark.parametrize("factor_bits", [8, 4])
def test_packed_factors_are_read_as_integers(factor_bits: int) -> None:
    weight, x = packed_weight(2, 40, 96, 32), random_input(3, 96)
    kernel, factors = module(weight), random_factors(weight, BLOCK, factor_bits)
    read = ReadFactors(factors.down.dequantize(), factors.up.dequantize().T, (factors.down, factors.up))
    kernel.adapter.attach(read, torch.device("cpu"))
    assert close(kernel(x), expected(kernel, weight, x))
    assert kernel._made.layer.cpu.factors.nbytes < 1.3 * (factors.down.nbytes + factors.up.nbytes)
    kernel.adapter.lora_B.mul_(2)
    assert close(kernel(x), expected(kernel, weight, x))


@needs_kernels
def test_gradients_by_input_and_factors() -> None:
    weight, x = packed_weight(2, 40, 96, 32), random_input(4, 96)
    kernel = module(weight)
    dense = expected(kernel, weight, torch.eye(96)) - kernel.bias.double()
    inputs = x.clone().requires_grad_()
    kernel(inputs).square().sum().backward()
    assert close(inputs.grad, 2 * (expected(kernel, weight, x) @ dense.T))

    kernel.adapter.lora_A = kernel.adapter.lora_A.float().clone().requires_grad_()
    kernel.adapter.lora_B = kernel.adapter.lora_B.float().clone().requires_grad_()
    kernel.train()
    inputs = x.clone().requires_grad_()
    kernel(inputs).square().sum().backward()
    y = expected(kernel, weight, x).detach()
    assert close(inputs.grad, 2 * (y @ dense.T))
    assert close(kernel.adapter.lora_B.grad, 2 * (x.double() @ kernel.adapter.lora_A.double()).T @ y)
    assert close(kernel.adapter.lora_A.grad, 2 * x.double().T @ (y @ kernel.adapter.lora_B.double().T))

    with torch.no_grad():
        kernel.adapter.lora_B -= 0.1 * kernel.adapter.lora_B.grad
        assert close(kernel(x), expected(kernel, weight, x))


@needs_kernels
def test_gradient_of_an_adapter_that_is_frozen() -> None:
    weight = packed_weight(4, 20, 48, 16, sym=False)
    kernel = module(weight, bias=False)
    x = random_input(2, 48).requires_grad_()
    kernel(x).sum().backward()
    assert close(x.grad[0], expected(kernel, weight, torch.eye(48)).sum(1))


@needs_kernels
def test_copies_pickles_and_states() -> None:
    weight, x = packed_weight(3, 40, 96, 32, sym=False), random_input(2, 96)
    kernel = module(weight)
    y = kernel(x)
    assert torch.equal(copy.deepcopy(kernel)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(kernel))(x), y)
    state = kernel.state_dict()
    assert set(state) == {"qweight", "qzeros", "scales", "g_idx", "bias"}
    assert torch.equal(state["qweight"], weight.qweight)
    other = module(packed_weight(3, 40, 96, 32, sym=False, seed=9))
    other.load_state_dict(state)
    other.adapter = kernel.adapter
    assert torch.equal(other(x), y)


GIVEN_UP = ("qweight", "qzeros", "scales", "g_idx")


def takes_its_bytes_once(kernel: EoRAFusedLinear) -> bool:
    return all(kernel._buffers[name] is None for name in GIVEN_UP)


@needs_kernels
@torch.no_grad()
def test_the_packed_tensors_are_given_up_and_had_back() -> None:
    weight, x = packed_weight(3, 40, 96, 32, sym=False, desc_act=True), random_input(2, 96)
    kernel = module(weight)
    assert takes_its_bytes_once(kernel)
    y, device, dtype = kernel(x), kernel.weight.device, kernel.weight.dtype
    assert (device.type, dtype) == ("cpu", torch.float16) and takes_its_bytes_once(kernel)
    for found in (kernel.state_dict(), dict(kernel.named_buffers()), torch.nn.Sequential(kernel).state_dict(prefix="")):
        for name in GIVEN_UP:
            assert torch.equal(found.get(name, found.get(f"0.{name}")), getattr(weight, name))
    for other in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel)), kernel.to("cpu"), kernel):
        assert torch.equal(other(x), y) and takes_its_bytes_once(other)
    kernel.load_state_dict(kernel.state_dict())
    assert torch.equal(kernel(x), y) and takes_its_bytes_once(kernel)


@needs_kernels
@torch.no_grad()
def test_a_packed_tensor_that_was_asked_for_stays_and_may_be_written_to() -> None:
    weight, x = packed_weight(2, 40, 96, 32, sym=False), random_input(2, 96)
    kernel = module(weight)
    scales = kernel.scales
    for _ in range(2):
        scales.mul_(2)
        assert close(kernel(x), expected(kernel, replace(weight, scales=scales), x))
    assert kernel.scales is scales
    kernel.scales = weight.scales
    assert close(kernel(x), expected(kernel, weight, x))
    kernel.scales.mul_(3)
    assert close(kernel(x), expected(kernel, replace(weight, scales=weight.scales), x))


@needs_kernels
def test_the_torch_path_has_the_packed_tensors() -> None:
    weight = packed_weight(2, 40, 96, 32)
    kernel = module(weight, bias=False)
    torch.compiler.set_stance("force_eager")
    try:
        x = random_input(2, 96, torch.float64)
        with torch.no_grad():
            assert float((kernel(x).double() - expected(kernel, weight, x)).norm()) < 1e-2
    finally:
        torch.compiler.set_stance("default")
    assert torch.equal(kernel.qweight, weight.qweight)


@needs_kernels
@torch.no_grad()
def test_a_weight_that_cannot_be_had_back_is_kept() -> None:
    g_idx = torch.tensor([3] * 37 + [0] * 27, dtype=torch.int32)
    weight = replace(packed_weight(3, 20, 64, 16, sym=False), g_idx=g_idx)
    kernel, x = module(weight), random_input(2, 64)
    assert close(kernel(x), expected(kernel, weight, x)) and not takes_its_bytes_once(kernel)


@needs_kernels
@torch.no_grad()
def test_loaded_in_inference_mode_it_sees_writes() -> None:
    weight, x = packed_weight(2, 40, 96, 32), random_input(2, 96)
    with torch.inference_mode():
        kernel = module(weight)
        kernel(x)
        kernel.bias.add_(1)
        assert close(kernel(x), expected(kernel, weight, x))
        kernel.adapter.lora_B.mul_(2)
        assert close(kernel(x), expected(kernel, weight, x))


@needs_kernels
@torch.no_grad()
def test_another_dtype_leaves_factors_as_they_are() -> None:
    weight = packed_weight(2, 40, 96, 32)
    adapter = module(weight).adapter
    before = adapter.lora_A, adapter.lora_B
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = random_input(2, 96, dtype)
        y = adapter.apply(x=x, out=torch.zeros(2, 40, dtype=dtype))
        wanted = x.double() @ before[0].double() @ before[1].double()
        assert y.dtype == dtype and torch.allclose(y.double(), wanted, rtol=0.05, atol=0.05)
    assert adapter.lora_A is before[0] and adapter.lora_B is before[1]
    # What was converted is not given out once the factors were written to.
    x = random_input(2, 96)
    once = adapter.apply(x=x, out=torch.zeros(2, 40))
    adapter.lora_B.mul_(2)
    assert torch.allclose(adapter.apply(x=x, out=torch.zeros(2, 40)), 2 * once, rtol=1e-3)


@needs_kernels
@torch.no_grad()
def test_packed_factors_lie_in_memory_as_they_are_stored() -> None:
    weight, x = packed_weight(2, 40, 96, 32), random_input(3, 96)
    kernel, factors = module(weight), random_factors(weight, RANK, 4)
    read = ReadFactors(factors.down.dequantize(), factors.up.dequantize().T, (factors.down, factors.up))
    kernel.adapter.attach(read, torch.device("cpu"))
    kernel(x)
    assert kernel.adapter.stored()[:2] == (None, None)
    for found, one in zip(kernel.adapter.packed, (factors.down, factors.up), strict=True):
        assert torch.equal(found.codes, one.codes) and torch.equal(found.scales, one.scales)
    assert torch.equal(kernel.adapter.lora_A, factors.down.dequantize().T)
    assert kernel.adapter.stored()[:2] == (None, None)  # it was only looked at
    for rows in (RANK, 2):
        kernel.adapter.attach(read, torch.device("cpu"))
        part = kernel.adapter.lora_B[:rows]
        kernel(x)
        part.mul_(2)
        assert kernel.adapter.packed is None and close(kernel(x), expected(kernel, weight, x))
    kernel.adapter.attach(read, torch.device("cpu"))
    kernel.adapter.lora_A = kernel.adapter.lora_A * 2
    assert kernel.adapter.packed is None and torch.equal(kernel.adapter.lora_B, factors.up.dequantize())
    assert close(kernel(x), expected(kernel, weight, x))


@needs_kernels
def test_inside_a_compiled_model() -> None:
    weight, x = packed_weight(2, 40, 96, 32), random_input(2, 96)
    kernel = module(weight)
    compiled = torch.compile(torch.nn.Sequential(kernel, torch.nn.ReLU()), backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), kernel(x).relu())


@needs_kernels
def test_moved_and_cast() -> None:
    weight, x = packed_weight(2, 40, 96, 32), random_input(2, 96)
    kernel = module(weight)
    y = kernel(x)
    assert torch.equal(kernel.to("cpu")(x), y)
    assert torch.equal(kernel.float()(x), y)
    assert kernel.to("meta")(x.to("meta")).device.type == "meta"


@needs_kernels
def test_a_damaged_checkpoint_is_refused_by_name() -> None:
    weight = packed_weight(2, 40, 96, 32)
    kernel = module(weight)
    kernel.g_idx = torch.full((96,), 7, dtype=torch.int32)
    with pytest.raises(LayoutError, match=r"layer\.q: g_idx should be 0 to 2, found values from 7 to 7"):
        kernel.post_init()


@needs_kernels
@pytest.mark.parametrize("off", ["cpu-codes", "cpu-codes,cpu-tiles", "avx512-bf16, avx512, avx2"])
def test_the_switches_turn_paths_off(monkeypatch: pytest.MonkeyPatch, off: str) -> None:
    weight, x = packed_weight(2, 40, 96, 32), random_input(2, 96, torch.float16)
    fused = module(weight)
    monkeypatch.setenv(dispatch.SWITCH, off)
    kernel = module(weight)
    assert kernel.choice(x).path != fused.choice(x).path or kernel.choice(x).isa != fused.choice(x).isa
    assert float((kernel(x).double() - expected(kernel, weight, x)).abs().max()) < 2e-2
