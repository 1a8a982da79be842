"""SmolLM2's layers through the fused kernels: the logits and the text of the unfused path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel import BACKEND, QuantizeConfig
from safetensors.torch import load_file

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.formats.names import PLAN_MARK, QUANTIZE_CONFIG
from gptqmodel_eora_ext.hosts.gptqmodel.checkpoint.load import adapters_off
from gptqmodel_eora_ext.hosts.gptqmodel.fused import EoRAFusedLinear
from gptqmodel_eora_ext.kernels.cpu.build import library
from tests.e2e import helpers

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(library() is None, reason="no C++ compiler")]
# Share of the logits' size by which two roundings of the same sums differ, two layers and the head on. Stock adds the
# base's output and the adapter's, both rounded, with Ŵ rounded to the dtype.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(scope="module")
def checkpoint(two_layers: Path, calibration: helpers.Batches, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / "checkpoint"
    adapter = EoRA(rank=24, factor_bits=4)
    return helpers.quantize(
        two_layers, folder, QuantizeConfig(bits=2, group_size=64), calibration, adapter=adapter
    ).folder


def unfused(folder: Path, dtype: torch.dtype) -> Any:
    """GPTQModel's torch kernel; it loads 16 bits alone, of which float16 are what the file holds."""
    if dtype == torch.float32:
        return helpers.load(folder, dtype=torch.float16).float()
    return helpers.load(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_logits_and_text_of_the_unfused_path(checkpoint: Path, token_ids: list[int], dtype: torch.dtype) -> None:
    fused = helpers.load(checkpoint, dtype=dtype, backend=BACKEND.AUTO)
    kernels = helpers.kernels(fused)
    assert len(kernels) == 14 and all(isinstance(kernel, EoRAFusedLinear) for kernel in kernels.values())
    stock = unfused(checkpoint, dtype)
    prompt = torch.tensor([token_ids[:100]])
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        for tokens in (prompt, prompt[:, :9]):
            wanted, found = stock(tokens).logits.float(), fused(tokens).logits.float()
            assert float((found - wanted).norm()) < ROUNDING[dtype] * float(wanted.norm())
        with adapters_off(fused), adapters_off(stock):
            bare = fused(prompt).logits.float()
            assert float((bare - stock(prompt).logits.float()).norm()) < ROUNDING[dtype] * float(bare.norm())
            assert float((bare - fused(prompt).logits.float()).abs().max()) == 0
        if dtype == torch.float32:
            texts = [
                model.generate(prompt[:, :20], max_new_tokens=64, min_new_tokens=64, do_sample=False)
                for model in (fused, stock)
            ]
            assert texts[0].shape == (1, 84) and torch.equal(*texts)


def test_saved_again_it_is_the_same_checkpoint(checkpoint: Path, token_ids: list[int], tmp_path: Path) -> None:
    from gptqmodel import GPTQModel

    prompt = torch.tensor([token_ids[:30]])
    with helpers.quiet():
        host = GPTQModel.load(str(checkpoint), dtype=torch.float32)
        logits = host.model(prompt).logits
        host.save(str(tmp_path / "again"))
    again = helpers.load(tmp_path / "again", dtype=torch.float32, backend=BACKEND.AUTO)
    assert torch.equal(again(prompt).logits, logits)
    # The kernel had given up the tensors of both files, and had them back.
    for name in ("model.safetensors", "eora/adapter_model.safetensors"):
        first, second = (load_file(folder / name) for folder in (checkpoint, tmp_path / "again"))
        assert first.keys() == second.keys()
        # The scales are in the dtype that the model was loaded in.
        assert all(torch.equal(one, second[key].to(one.dtype)) for key, one in first.items())


@pytest.fixture(scope="module")
def bare(two_layers: Path, calibration: helpers.Batches, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that GPTQModel made without an adapter."""
    from gptqmodel import GPTQModel

    folder = tmp_path_factory.mktemp("bare") / "checkpoint"
    with helpers.quiet():
        host = GPTQModel.load(str(two_layers), QuantizeConfig(bits=2, group_size=64))
        host.quantize(calibration, batch_size=4)
        host.save(str(folder))
    return folder


def marked(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as a plan's config would have made it."""
    shutil.copytree(checkpoint, folder)
    path = folder / QUANTIZE_CONFIG
    config = json.loads(path.read_text())
    config["meta"] = {**config["meta"], PLAN_MARK: "eora-plan-1"}
    path.write_text(json.dumps(config))
    return folder


def test_without_an_adapter_the_kernels_serve_whoever_asks(bare: Path, token_ids: list[int], tmp_path: Path) -> None:
    from gptqmodel import GPTQModel

    prompt = torch.tensor([token_ids[:30]])
    stock = unfused(bare, torch.float32)
    unasked = helpers.kernels(helpers.load(bare, backend=BACKEND.AUTO)).values()
    assert not any(isinstance(kernel, EoRAFusedLinear) for kernel in unasked)
    planned = marked(bare, tmp_path / "planned")
    with helpers.quiet(), torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        wanted = stock(prompt).logits
        for load in (
            lambda: GPTQModel.load(str(bare), adapter=EoRA(), dtype=torch.float32),
            lambda: GPTQModel.load(str(planned), dtype=torch.float32),
            lambda: GPTQModel.load(str(tmp_path / "again"), dtype=torch.float32),
        ):
            host = load()
            served = [type(kernel) for kernel in helpers.kernels(host.model).values()]
            assert served == [EoRAFusedLinear] * 14
            assert float((host.model(prompt).logits - wanted).norm()) < ROUNDING[torch.float32] * float(wanted.norm())
            host.save(str(tmp_path / "again"))  # the mark is kept; no adapter is written
    assert not (tmp_path / "again" / "eora").exists()


def test_a_loaded_checkpoint_takes_its_packed_bytes_once(checkpoint: Path, token_ids: list[int]) -> None:
    """Also after it generated, and was asked for what transformers asks a model."""
    model = helpers.load(checkpoint, backend=BACKEND.AUTO)
    model.generate(torch.tensor([token_ids[:8]]), max_new_tokens=4, do_sample=False)
    assert model.dtype and model.device.type == "cpu" and model.get_memory_footprint()
    kernels = helpers.kernels(model)
    assert kernels and all(kernel._buffers["qweight"] is None for kernel in kernels.values())
    assert [kernel.adapter.stored()[:2] for kernel in kernels.values()] == [(None, None)] * len(kernels)
    # The adapter has no other form of the factors than the one that the kernel multiplies with.
    assert all(kernel.adapter.form is kernel._made.layer.cpu.factors for kernel in kernels.values())
