"""GPTQ checkpoints in GGUF: the very same weights, module by module; adapters in the file's order; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file

from gptqmodel_eora_ext.formats.gguf.lora import SUFFIX_A, SUFFIX_B, read_lora_header
from gptqmodel_eora_ext.formats.gguf.model import GGUFModel, read_tensor
from gptqmodel_eora_ext.formats.packed_weights import PackedWeight, pack_words
from gptqmodel_eora_ext.hosts.jobs import Exported, ExportJob
from gptqmodel_eora_ext.hosts.registry import exporter
from gptqmodel_eora_ext.kernels.reference import dequantize
from tests.gguf_files import in_file_order, tensor_of, write_model
from tests.hosts.test_llamacpp import linears, make

GROUP = 32


def packed(name: str, weight: torch.Tensor, bits: int, group: int, *, zero: int | None = None) -> PackedWeight:
    """A weight rounded to nearest and packed as GPTQ's files have it, zero points as they are."""
    middle = 1 << (bits - 1) if zero is None else zero
    rows = weight.detach().float()
    grouped = rows.view(len(rows), -1, group)
    scales = (grouped.abs().amax(2) / (1 << (bits - 1))).half()
    codes = (grouped / scales.float()[..., None]).round().add(middle).clamp(0, (1 << bits) - 1).view(len(rows), -1)
    zeros = torch.full((scales.shape[1], len(rows)), middle)
    return PackedWeight(
        pack_words(codes.T.to(torch.int32), bits), pack_words(zeros.T, bits).T.contiguous(), scales.T.contiguous(),
        None, bits, group, rows.shape[1], len(rows), False, name,
    )  # fmt: skip


def checkpoint(folder: Path, weights: dict[str, PackedWeight], kind: str = "gptq_v2", **replaced: torch.Tensor) -> Path:
    folder.mkdir()
    tensors = {}
    for name, one in weights.items():
        g_idx = replaced.get("g_idx", torch.arange(one.in_features) // one.group_size).to(torch.int32)
        scales = one.scales.to(replaced["scales"].dtype) * 1.0001 if "scales" in replaced else one.scales
        tensors |= {f"{name}.qweight": one.qweight, f"{name}.qzeros": one.qzeros, f"{name}.scales": scales,
                    f"{name}.g_idx": g_idx[: one.in_features]}  # fmt: skip
    save_file(tensors, folder / "model.safetensors")
    (folder / "quantize_config.json").write_text(json.dumps({"checkpoint_format": kind, "bits": 4}))
    return folder


def export(source: Path, like: Path, output: Path, base: Path | None = None) -> Exported:
    return exporter(like)(ExportJob(source, like, output, base))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[Any, Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    model = make("llama", folder / "base", tokenizer)
    return model, folder / "base", write_model(model, folder / "f16.gguf", "F16")


@pytest.mark.parametrize(("bits", "group", "kind"), [(4, 32, "Q4_0"), (4, 16, None), (8, 32, "Q8_0"), (2, 64, "Q2_0")])
def test_weights_stay_what_they_are(
    llama: tuple[Any, Path, Path], tmp_path: Path, bits: int, group: int, kind: str | None
) -> None:
    model, _, like = llama
    # Of the width of 64 alone two bits have whole blocks.
    fitting = {name: one for name, one in linears(model).items() if one.in_features % max(group, 64) == 0}
    weights = {name: packed(name, one.weight, bits, group) for name, one in fitting.items()}
    source = checkpoint(tmp_path / "c", weights)
    if kind is None:
        with pytest.raises(ValueError, match=r"have no exact type.*groups of 16"):
            export(source, like, tmp_path / "out.gguf")
        return
    done = export(source, like, tmp_path / "out.gguf")
    assert done.modules == len(weights) and done.inexact == {} and done.adapter is None
    before, after = GGUFModel(like), GGUFModel(tmp_path / "out.gguf")
    assert list(after.tensors) == list(before.tensors) and after.header.fields == {
        **before.header.fields, "general.file_type": {"Q4_0": 2, "Q8_0": 7, "Q2_0": 41}[str(kind)],
    }  # fmt: skip
    for name, one in weights.items():
        tensor = tensor_of(name)
        assert after.info(tensor).type == kind
        expected = in_file_order(name, dequantize(one), model.config)
        np.testing.assert_array_equal(after.read(tensor).numpy(), expected)
    others = set(before.tensors) - {tensor_of(name) for name in weights}
    for tensor in others:
        assert torch.equal(before.read(tensor), after.read(tensor))


def test_an_adapter_lies_over_the_exported_model(llama: tuple[Any, Path, Path], tmp_path: Path) -> None:
    """A PEFT folder alone, with a scale and names of its own, becomes a LoRA of the same update."""
    model, base, like = llama
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"]))
    try:
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1)
        wrapped.save_pretrained(tmp_path / "lora")
        expected = {
            name.removeprefix("base_model.model."): 3 * one.lora_B["default"].weight @ one.lora_A["default"].weight
            for name, one in wrapped.named_modules() if hasattr(one, "lora_A") and name.endswith("_proj")
        }  # fmt: skip
    finally:
        wrapped.unload()
    done = export(tmp_path / "lora", like, tmp_path / "lora.gguf", base)
    assert done.model is None and done.modules == len(expected) == 4
    tensors = read_lora_header(tmp_path / "lora.gguf").header.tensors
    for name, update in expected.items():
        pair = (read_tensor(tensors[f"{tensor_of(name)}{suffix}"]) for suffix in (SUFFIX_B, SUFFIX_A))
        lora_B, lora_A = pair
        np.testing.assert_allclose((lora_B @ lora_A).numpy(), in_file_order(name, update, model.config), atol=2e-3)
    with pytest.raises(ValueError, match="by --base"):
        export(tmp_path / "lora", like, tmp_path / "again.gguf")


def test_what_would_be_another_model_is_refused_by_name(llama: tuple[Any, Path, Path], tmp_path: Path) -> None:
    model, _, like = llama
    name, linear = next(iter(linears(model).items()))

    def refused(message: str, weight: PackedWeight, kind: str = "gptq_v2", **replaced: torch.Tensor) -> None:
        folder = tmp_path / f"c{len(list(tmp_path.iterdir()))}"
        with pytest.raises(ValueError, match=message):
            export(checkpoint(folder, {name: weight}, kind, **replaced), like, tmp_path / "out.gguf")

    good = packed(name, linear.weight, 4, GROUP)
    refused("3 bits fit no type", packed(name, linear.weight, 3, GROUP))
    refused("zero points are not all 8", packed(name, linear.weight, 4, GROUP, zero=7))
    refused("order of desc_act", good, g_idx=(torch.arange(64) // GROUP).flip(0))
    refused("in the format 'gemm'", good, kind="gemm")
    refused("was not quantised from", packed(name, torch.randn_like(linear.weight), 4, GROUP))
    assert not (tmp_path / "out.gguf").exists()


def test_scales_that_float16_rounds_are_told(llama: tuple[Any, Path, Path], tmp_path: Path) -> None:
    model, _, like = llama
    name, linear = next(iter(linears(model).items()))
    weights = {name: packed(name, linear.weight, 4, GROUP)}
    source = checkpoint(tmp_path / "c", weights, scales=torch.empty(0, dtype=torch.float32))
    done = export(source, like, tmp_path / "out.gguf")
    assert 0 < done.inexact[name] < 2**-10
