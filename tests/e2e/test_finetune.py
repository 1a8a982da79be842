"""Fine-tuning from an adapter: PEFT over the hosts' kernels, trained by transformers' Trainer and by trl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD
from peft.tuners.lora.gptq import GPTQLoraLinear
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from typer.testing import CliRunner

from gptqmodel_eora_ext import EoRA, EoRAConfig, load_peft
from gptqmodel_eora_ext.adapter.errors import AdapterError
from gptqmodel_eora_ext.cli import app
from gptqmodel_eora_ext.evaluate.demo import demo_text
from gptqmodel_eora_ext.hosts.gptqmodel.fused import EoRAFusedLinear
from gptqmodel_eora_ext.hosts.gptqmodel.known_weights import dequantize
from gptqmodel_eora_ext.hosts.terminal import quiet

from .helpers import Batches, Made, kernels, quantize
from .test_autoround import autoround, random_model

pytestmark = pytest.mark.e2e

STEPS = 6


@pytest.fixture(scope="module")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model: what learns, and through which kernels, does not turn on the weights."""
    return random_model(tmp_path_factory.mktemp("base"), tokenizer, layers=2)


@pytest.fixture(scope="module")
def made(base: Path, calibration: Batches, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """At 2 bits, with an adapter in 16 bits."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    return quantize(base, folder, QuantizeConfig(bits=2, group_size=64), calibration)


@pytest.fixture(scope="module")
def packed(base: Path, calibration: Batches, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """At 3 bits, with an adapter in 4."""
    config = QuantizeConfig(bits=3, group_size=64)
    folder = tmp_path_factory.mktemp("packed") / "out"
    return quantize(base, folder, config, calibration, adapter=EoRA(rank=16, factor_bits=4))


def data(token_ids: list[int]) -> list[dict[str, list[int]]]:
    windows = [token_ids[start : start + 64] for start in range(2000, 2000 + 8 * 64, 64)]
    return [{"input_ids": one, "labels": one} for one in windows]


def trained(model: Any, rows: list[dict[str, list[int]]], out: Path) -> list[float]:
    """Losses of steps of a plain Trainer, all on the same windows."""
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=8, max_steps=STEPS, learning_rate=2e-2, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def opened(folder: Path, **options: Any) -> Any:
    with quiet():
        return GPTQModel.load(str(folder), **options)


def test_trains_over_our_kernels_and_loads_again(made: Made, token_ids: list[int], tmp_path: Path) -> None:
    model = load_peft(opened(made.folder), made.folder / "eora", is_trainable=True)
    learning = {name for name, one in model.named_parameters() if one.requires_grad}
    assert len(learning) == 28 and all(".lora_" in name for name in learning)
    layer = next(one for one in model.modules() if isinstance(one, GPTQLoraLinear))
    assert isinstance(layer.base_layer, EoRAFusedLinear)
    losses = trained(model, data(token_ids), tmp_path)
    assert losses[-1] < losses[0] - 0.1
    assert layer.base_layer._buffers["qweight"] is None, "the packed tensors should lie in memory once"

    model.save_pretrained(str(tmp_path / "trained"))
    ids = torch.tensor([token_ids[5000:5100]])
    again = opened(made.folder, adapter=EoRA(path=tmp_path / "trained")).model
    start = opened(made.folder).model
    with torch.inference_mode():
        logits = [one.eval()(ids).logits.float() for one in (model, again, start)]
    changed = float((logits[2] - logits[0]).norm())
    assert float((logits[1] - logits[0]).norm()) < 0.1 * changed


def test_the_adapter_from_loading_is_not_added_twice(made: Made, token_ids: list[int]) -> None:
    ids = torch.tensor([token_ids[5000:5100]])
    host = opened(made.folder)
    with torch.inference_mode():
        expected = host.model(ids).logits.float()
        found = load_peft(host, made.folder / "eora")(ids).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_gradients_are_those_of_the_dense_weight(made: Made, token_ids: list[int]) -> None:
    """What our kernels pass back to a module's input and to its factors, against Ŵ in float32 and torch."""
    host = opened(made.folder, dtype=torch.float32)
    model = load_peft(host, made.folder / "eora", is_trainable=True)
    name, layer = next((name, one) for name, one in model.named_modules() if name.endswith("0.mlp.down_proj"))
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, layer.base_layer.in_features, generator=generator, requires_grad=True)
    grad = torch.randn(96, layer.base_layer.out_features, generator=generator)
    found = torch.autograd.grad(layer(x), [x, lora_A, lora_B], grad)
    weight = dequantize(layer.base_layer).float().clone()
    expected = torch.autograd.grad(x @ weight.T + x @ lora_A.T @ lora_B.T, [x, lora_A, lora_B], grad)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-3, name


def test_trl_trains_packed_factors_which_are_packed_again(packed: Made, tokenizer: Any, tmp_path: Path) -> None:
    host = opened(packed.folder)
    with pytest.raises(AdapterError, match="eora export"):
        load_peft(host, packed.folder / "eora")
    model = load_peft(host, packed.folder / "eora", is_trainable=True)
    text = demo_text("calibration").read_text(encoding="utf-8")
    rows = Dataset.from_list([{"text": text[start : start + 400]} for start in range(0, 3200, 400)])
    arguments = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=STEPS, learning_rate=2e-2, logging_steps=1,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", max_length=64, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=arguments)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(str(packed.folder / "trained"))
    heldout = tmp_path / "heldout.txt"
    heldout.write_text(demo_text("heldout").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    done = CliRunner().invoke(
        app, ["export", str(packed.folder / "trained"), "--packed", str(packed.folder / "trained-4bit"),
              "--text", str(heldout)]
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "factors in 4 bits" in done.output and "of its norm in the mean" in done.output
    assert "trained-4bit" in done.output.rpartition("perplexity")[2]
    opened(packed.folder, adapter=EoRA(path=packed.folder / "trained-4bit"))


@pytest.mark.parametrize("exported", ["auto_round", "auto_round:auto_gptq"])
def test_autorounds_checkpoints_train(
    exported: str, base: Path, tokenizer: Any, calibration: Batches, token_ids: list[int], tmp_path: Path
) -> None:
    quantizer = autoround(base, tokenizer, calibration, ["rtn", EoRAConfig(rank=8)], scheme="W4A16", iters=None)
    _, folder = quantizer.quantize_and_save(str(tmp_path), format=exported)
    model: Any
    if exported == "auto_round":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    else:
        model = opened(Path(folder))
    model = load_peft(model, Path(folder) / "eora", is_trainable=True)
    losses = trained(model, data(token_ids), tmp_path / "run")
    assert losses[-1] < losses[0] - 0.1


def test_a_kernel_without_gradients_is_named(
    base: Path, calibration: Batches, token_ids: list[int], tmp_path: Path
) -> None:
    config = QuantizeConfig(bits=4, group_size=64, quant_method=METHOD.AWQ, format=FORMAT.GEMM)
    awq = quantize(base, tmp_path / "awq", config, calibration, adapter=EoRA(rank=8))
    host = opened(awq.folder, backend=BACKEND.AWQ_TORCH)
    losses = trained(load_peft(host, awq.folder / "eora", is_trainable=True), data(token_ids), tmp_path / "run")
    assert losses[-1] < losses[0] - 0.1
    host = opened(awq.folder)
    inference_only = [one for one in kernels(host.model).values() if not one.SUPPORTS_TRAINING]
    if not inference_only:
        pytest.skip("GPTQModel chose a kernel with gradients here")
    with pytest.raises(ValueError, match=rf"{type(inference_only[0]).__name__}, which gives no gradients.*AWQ_TORCH"):
        load_peft(host, awq.folder / "eora", is_trainable=True)
    assert inference_only[0].adapter is not None, "a refusal should change nothing"
