"""GPTQModel's own selection on a GPU that is not here, and `triton_linear.py` in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel import BACKEND
from gptqmodel.adapter.adapter import Lora
from gptqmodel.models._const import DEVICE
from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear
from gptqmodel.quantization.config import FORMAT, METHOD
from gptqmodel.utils import model
from gptqmodel.utils.importer import AUTO_BACKEND_KERNEL_MAPPING, clear_validation_cache, select_quant_linear

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.hosts.gptqmodel import seams
from gptqmodel_eora_ext.hosts.gptqmodel.triton import EoRATritonLinear
from gptqmodel_eora_ext.kernels.dispatch import SWITCH

from ..triton_process import assert_passes

pytest.importorskip("triton")

LINEAR = Path(__file__).with_name("triton_linear.py")


def select(bits: int, adapter: Any, device: DEVICE = DEVICE.CUDA, format: FORMAT = FORMAT.GPTQ) -> Any:
    return select_quant_linear(
        bits=bits, group_size=64, desc_act=False, sym=False, device=device, backend=BACKEND.AUTO, format=format,
        quant_method=METHOD.GPTQ, pack=False, pack_dtype=torch.int32, adapter=adapter,
    )  # fmt: skip


def test_under_the_interpreter() -> None:
    assert_passes(LINEAR, interpreted=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_this_gpu() -> None:
    assert_passes(LINEAR, interpreted=False)


@pytest.mark.parametrize("format", [FORMAT.GPTQ, FORMAT.GPTQ_V2])
@pytest.mark.parametrize("device", [DEVICE.CUDA, DEVICE.ROCM])
@pytest.mark.parametrize("bits", [2, 3])
def test_selected_for_an_eora_adapter(bits: int, device: DEVICE, format: FORMAT) -> None:
    assert select(bits, EoRA(rank=4), device, format) is EoRATritonLinear


@pytest.mark.parametrize("adapter", [None, Lora(rank=4, path="a")])
@pytest.mark.parametrize("bits", [2, 3])
def test_not_selected_without_one(bits: int, adapter: Any) -> None:
    assert select(bits, adapter) is not EoRATritonLinear


def explicit(adapter: Any) -> Any:
    """What a model's modules are tried with under an explicit backend."""
    return model.select_quant_linear(
        bits=2, group_size=64, desc_act=False, sym=False, device=DEVICE.CUDA, backend=BACKEND.GPTQ_TRITON,
        format=FORMAT.GPTQ, quant_method=METHOD.GPTQ, pack=False, pack_dtype=torch.int32, adapter=adapter,
        multi_select=True,
    )  # fmt: skip


def test_an_explicit_triton_backend_means_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explicit(EoRA(rank=4)) == [EoRATritonLinear, TritonV2Linear]
    assert explicit(Lora(rank=4, path="a")) == explicit(None) == [TritonV2Linear]
    monkeypatch.setenv(SWITCH, "triton")
    assert explicit(EoRA(rank=4)) == [TritonV2Linear]


def test_kernels_for_four_bits_keep_their_place() -> None:
    for format in (FORMAT.GPTQ, FORMAT.GPTQ_V2):
        order = list(AUTO_BACKEND_KERNEL_MAPPING[METHOD.GPTQ][format])
        ours = order.index(seams.TRITON_KEY)
        assert order.index(BACKEND.GPTQ_MARLIN) < order.index(BACKEND.GPTQ_EXLLAMA_V2) < ours
        assert order[ours + 1] == BACKEND.GPTQ_TRITON


@pytest.mark.parametrize("off", ["triton", "all"])
def test_switched_off(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, off)
    clear_validation_cache()
    try:
        assert select(2, EoRA(rank=4)) is not EoRATritonLinear
    finally:
        clear_validation_cache()


def test_the_order_of_kernels_is_put_back() -> None:
    order = AUTO_BACKEND_KERNEL_MAPPING[METHOD.GPTQ][FORMAT.GPTQ]
    seams.uninstall()
    try:
        stock = list(order)
        assert seams.TRITON_KEY not in stock and BACKEND.GPTQ_TRITON in stock
    finally:
        seams.install()
    assert [key for key in order if key not in (seams.FUSED_KEY, seams.TRITON_KEY)] == stock


def test_a_host_without_its_triton_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    order = AUTO_BACKEND_KERNEL_MAPPING[METHOD.GPTQ]
    without = {name: kernels.copy() for name, kernels in order.items()}
    del without[FORMAT.GPTQ][BACKEND.GPTQ_TRITON]
    monkeypatch.setitem(AUTO_BACKEND_KERNEL_MAPPING, METHOD.GPTQ, without)
    assert any("has no BACKEND.GPTQ_TRITON" in problem for problem in seams.kernel_order_problems())
