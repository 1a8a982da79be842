"""Adapters for checkpoints that transformers loads: what Ŵ is, what the factors take off the error, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gptqmodel_eora_ext.formats.names import ADAPTER_DETAILS
from gptqmodel_eora_ext.hosts.jobs import AdapterJob
from gptqmodel_eora_ext.hosts.registry import adapter_maker, loader
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.hosts.transformers.dense import IDENTITY_ROWS, dense_weight, weight_by_identity
from gptqmodel_eora_ext.hosts.transformers.reader import LayerReader
from gptqmodel_eora_ext.solve import eora, weighted_energy

from . import foreign_models as foreign
from .foreign_models import logits

RANK = 16
# Each multiplies what the model holds, rounded to bfloat16; they may add up in another order.
TOLERANCE = 0.01

Batches = list[dict[str, list[int]]]


def make(base: Path, checkpoint: Path, calibration: Batches, output: Path | None = None, **adapter: Any) -> Path:
    with quiet():
        job = AdapterJob(str(base), checkpoint, calibration, adapter or {"rank": RANK}, output=output, batch_size=4)
        return adapter_maker(checkpoint)(job)


def check(base: Path, checkpoint: Path, calibration: Batches, output: Path, **loading: Any) -> None:
    """Make an adapter, and hold the model that PEFT puts it on against what was computed apart."""
    from peft import PeftModel

    folder = make(base, checkpoint, calibration, output)
    modules = json.loads((folder / ADAPTER_DETAILS).read_text())["modules"]
    assert len(modules) == 14
    assert all(one["error_after"] < 0.95 * one["error_before"] for one in modules.values())
    ids = torch.tensor([calibration[0]["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", **loading)
    adapted = logits(PeftModel.from_pretrained(model, folder).eval(), ids)
    expected = logits(foreign.computed_apart(base, checkpoint, folder), ids)
    assert float((adapted - expected).norm() / expected.norm()) < TOLERANCE


@pytest.fixture(scope="module")
def pruned(two_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign.pruned_by_others(two_layers, tmp_path_factory.mktemp("foreign") / "pruned")


@pytest.fixture
def copy(pruned: Path, tmp_path: Path) -> Path:
    """To be changed."""
    return Path(shutil.copytree(pruned, tmp_path / "copy"))


def test_a_model_that_others_pruned(pruned: Path, two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    check(two_layers, pruned, calibration, tmp_path / "adapter")


def test_blocks_of_fp8(two_layers: Path, tmp_path: Path) -> None:
    checkpoint = foreign.in_blocks_of_fp8(two_layers, tmp_path / "fp8")
    stored = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    found = dense_weight(LayerReader(checkpoint).module(name), name, torch.bfloat16)
    codes, scales = stored[f"{name}.weight"].float(), stored[f"{name}.weight_scale_inv"]
    expected = codes * scales.repeat_interleave(foreign.BLOCK, 0).repeat_interleave(foreign.BLOCK, 1)
    assert torch.equal(found, expected.to(torch.bfloat16).float())


def test_one_layer_is_in_memory_at_a_time(pruned: Path) -> None:
    reader = LayerReader(pruned)
    module = reader.module("model.layers.1.mlp.up_proj")
    assert not module.weight.is_meta
    assert reader._part is not None
    model = reader._part[1]
    there = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert there and all(name.startswith("model.layers.1.") for name in there)
    assert all(parameter.is_meta for parameter in reader.model.parameters())


def test_the_first_factors_are_at_the_optimum(
    pruned: Path, two_layers: Path, calibration: Batches, tmp_path: Path
) -> None:
    """Inputs of the first module are the same in both models, so its second moment can be taken from the base."""
    calibration = calibration[:4]
    folder = make(two_layers, pruned, calibration, tmp_path / "adapter")
    name = "model.layers.0.self_attn.q_proj"
    model = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.float32)
    rows: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].flatten(0, 1)))
    for batch in calibration:
        logits(model, torch.tensor([batch["input_ids"]]))
    x = torch.cat(rows).double()
    second_moment = x.T @ x / len(x)
    delta = (
        model.get_submodule(name).weight.detach().double()
        - load_file(pruned / "model.safetensors")[f"{name}.weight"].double()
    )
    stored = load_file(folder / "adapter_model.safetensors")
    lora_A, lora_B = (stored[f"base_model.model.{name}.lora_{half}.weight"].double() for half in "AB")
    best_A, best_B = eora(delta, second_moment, RANK, exact=True)
    found, best = (weighted_energy(delta - up @ down, second_moment) for down, up in
                   ((lora_A, lora_B), (best_A, best_B)))  # fmt: skip
    assert found <= 1.001 * best
    report = json.loads((folder / ADAPTER_DETAILS).read_text())["modules"][name]
    assert report["error_after"] == pytest.approx(found, rel=1e-3)


def test_modules_that_were_not_changed_get_no_adapter(
    copy: Path, two_layers: Path, calibration: Batches, tmp_path: Path
) -> None:
    tensors, base = load_file(copy / "model.safetensors"), load_file(two_layers / "model.safetensors")
    kept = "model.layers.1.self_attn.v_proj"
    tensors[f"{kept}.weight"] = base[f"{kept}.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    folder = make(two_layers, copy, calibration[:4], tmp_path / "adapter")
    modules = json.loads((folder / ADAPTER_DETAILS).read_text())["modules"]
    assert len(modules) == 13 and kept not in modules


def test_evaluation_puts_adapters_on_and_takes_them_off(
    copy: Path, two_layers: Path, calibration: Batches, tmp_path: Path
) -> None:
    folder = make(two_layers, copy, calibration[:4])
    assert folder == copy / "eora"
    packed = make(two_layers, copy, calibration[:4], tmp_path / "packed", rank=32, factor_bits=4)
    ids = torch.tensor([calibration[0]["input_ids"]])
    loaded = loader(copy)(copy, folder)
    first = logits(loaded.model, ids)
    expected = logits(foreign.computed_apart(two_layers, copy, folder), ids)
    assert float((first - expected).norm() / expected.norm()) < TOLERANCE
    with loaded.with_adapter(None):
        plain = logits(loaded.model, ids)
    with loaded.with_adapter(packed):
        other = logits(loaded.model, ids)
    assert torch.equal(plain, logits(AutoModelForCausalLM.from_pretrained(copy, dtype="auto").eval(), ids))
    assert torch.equal(logits(loaded.model, ids), first)
    assert not torch.equal(other, first) and not torch.equal(other, plain)


# What does not fit -------------------------------------------------------------------------------------------------


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(base: Path, checkpoint: Path, calibration: Batches, tmp_path: Path) -> str:
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        make(base, checkpoint, calibration, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    return str(caught.value)


def test_the_base_itself_is_nothing_to_compensate(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    same = Path(shutil.copytree(two_layers, tmp_path / "same"))
    message = refused(two_layers, same, calibration, tmp_path)
    assert "very weights" in message and "in all 14 linear modules" in message and "nothing to compensate" in message


def test_joined_modules_are_told_by_name(copy: Path, two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    def join(tensors: dict[str, torch.Tensor]) -> None:
        names = [f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkv"]
        tensors["model.layers.1.self_attn.qkv_proj.weight"] = torch.cat([tensors.pop(name) for name in names])

    change(copy, join)
    message = refused(two_layers, copy, calibration, tmp_path)
    assert "has no module model.layers.1.self_attn.q_proj" in message
    assert "self_attn.qkv_proj" in message and "11 of 14 modules were matched by name" in message


def test_another_base_is_refused(copy: Path, two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    def shuffle(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.embed_tokens.weight"
        tensors[name] = tensors[name].flip(0).contiguous()

    other = Path(shutil.copytree(copy, tmp_path / "other"))
    change(other, shuffle)
    assert "model.embed_tokens.weight: they differ by" in refused(two_layers, other, calibration, tmp_path)

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].flip(0).contiguous()

    change(copy, turn)
    message = refused(two_layers, copy, calibration, tmp_path)
    assert "model.layers.0.mlp.up_proj: weights of both have the cosine" in message and "was not made from" in message


def test_scales_that_were_moved_are_told(copy: Path, two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    def smooth(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"] *= 2

    change(copy, smooth)
    assert "moved scales between layers" in refused(two_layers, copy, calibration, tmp_path)


def test_another_width_is_refused(copy: Path, two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 768}))

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            for kind in ("gate", "up"):
                name = f"model.layers.{layer}.mlp.{kind}_proj.weight"
                tensors[name] = tensors[name][:768].contiguous()
            name = f"model.layers.{layer}.mlp.down_proj.weight"
            tensors[name] = tensors[name][:, :768].contiguous()

    change(copy, halve)
    message = refused(two_layers, copy, calibration, tmp_path)
    assert "768 × 576 in the checkpoint, 1536 × 576 in the base" in message


def test_tensors_that_transformers_does_not_read_are_told(
    copy: Path, two_layers: Path, calibration: Batches, tmp_path: Path
) -> None:
    """As of a format that this release of transformers no longer reads."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if foreign.is_linear_weight(name)]:
            module = name.removesuffix(".weight")
            tensors[f"{module}.W_q"] = tensors.pop(name)

    change(copy, rename)
    message = refused(two_layers, copy, calibration, tmp_path)
    assert "reads no weight of" in message and "whose files hold W_q there" in message


def test_pickles_are_not_opened(copy: Path, two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "holds no *.safetensors file" in refused(two_layers, copy, calibration, tmp_path)


# Blocks of the identity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_features", [1, 63, IDENTITY_ROWS, 2 * IDENTITY_ROWS + 5])
@pytest.mark.parametrize("bias", [True, False])
def test_blocks_of_the_identity_give_the_weight(dtype: torch.dtype, in_features: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(in_features, 24, bias=bias).to(dtype)
    found = weight_by_identity(linear, "linear", dtype)
    assert torch.equal(found, linear.weight.detach().float())
    assert (linear.bias is not None) == bias


class Quantising(torch.nn.Linear):
    """Quantises its inputs to 8 bits, by a scale of each row or a fixed one."""

    fixed: float | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = torch.tensor(self.fixed) if self.fixed else x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 128
        return super().forward((x / step).round().clamp(-128, 128) * step)


def test_a_module_that_quantises_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Quantising(70, 24)
    assert torch.equal(weight_by_identity(linear, "linear", torch.float32), linear.weight.detach())
    monkeypatch.setattr(linear, "fixed", 1 / 100)
    with pytest.raises(NotImplementedError, match=r"linear \(Quantising\) gives other digits .* by a fixed scale"):
        weight_by_identity(linear, "linear", torch.float32)
    with pytest.raises(NotImplementedError, match="tells no `in_features`"):
        weight_by_identity(torch.nn.Identity(), "block", torch.float32)
