"""Refinement through GPTQModel: when a checkpoint is saved, by the command, and on what is loaded afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.cli import app
from gptqmodel_eora_ext.evaluate.demo import demo_text
from gptqmodel_eora_ext.evaluate.divergence import summed_divergence
from gptqmodel_eora_ext.formats.names import ADAPTER_WEIGHTS
from gptqmodel_eora_ext.hosts.gptqmodel.trainable import open_trainee, trainee_of
from gptqmodel_eora_ext.refine.linear import TrainedLinear

from .helpers import Batches, Made, quantize

pytestmark = pytest.mark.e2e

# On a thousand tokens, whose validation is three windows, 4-bit factors get no better.
WINDOW, WINDOWS = 64, 60
SETTINGS = {"tokens": WINDOWS * WINDOW, "window": WINDOW, "learning_rate": 5e-4}


@pytest.fixture(scope="module")
def made(two_layers: Path, token_ids: list[int], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two layers of SmolLM2 at 2 bits, refined when they are saved."""
    folder = tmp_path_factory.mktemp("refined") / "model"
    adapter = EoRA(rank=16, factor_bits=4, refine=SETTINGS)
    cut = [token_ids[start : start + WINDOW] for start in range(0, WINDOWS * WINDOW, WINDOW)]
    calibration = [{"input_ids": one, "attention_mask": [1] * WINDOW} for one in cut]
    return quantize(two_layers, folder, QuantizeConfig(bits=2, group_size=64), calibration, adapter=adapter)


def test_saving_refines_and_names_the_result(made: Made) -> None:
    entry = json.loads((made.folder / "quantize_config.json").read_text())["adapter"]
    assert entry == {"name": "eora", "path": "eora-refined", "rank": 16}
    first, refined = (load_file(made.folder / name / ADAPTER_WEIGHTS) for name in ("eora", "eora-refined"))
    assert {name: (one.shape, one.dtype) for name, one in first.items()} == {
        name: (one.shape, one.dtype) for name, one in refined.items()
    }
    told = json.loads((made.folder / "eora-refined" / "eora.json").read_text())["refinement"]
    assert told["after"] < told["before"] and 0 < told["best_step"] <= told["steps"] <= WINDOWS


def test_the_loaded_model_is_nearer_to_full_precision(made: Made, two_layers: Path, token_ids: list[int]) -> None:
    """On text that neither trained nor validated."""
    ids = torch.tensor([token_ids[4000:4400]])
    wanted = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.float32)(ids).logits[0].detach()

    def divergence(adapter: str) -> float:
        model = GPTQModel.load(str(made.folder), adapter=EoRA(path=made.folder / adapter)).model
        with torch.inference_mode():
            return summed_divergence(wanted, model(ids).logits[0].float())

    assert divergence("eora-refined") < divergence("eora")


def test_a_kernel_of_the_host_gives_the_same_weight(made: Made) -> None:
    """By GPTQModel's own dequantisation, which serves what the plugin's kernels do not."""
    host = GPTQModel.load(str(made.folder), adapter=EoRA(), backend=BACKEND.GPTQ_TORCH)
    theirs, ours = trainee_of(host.model, "host").weights, open_trainee(made.folder).weights
    assert theirs.keys() == ours.keys()
    name = next(iter(ours))
    x = torch.randn(3, ours[name].in_features, requires_grad=True)
    found = [TrainedLinear(one[name], None)(x) for one in (theirs, ours)]
    gradients = [torch.autograd.grad(one.sum(), x)[0] for one in found]
    for one, other in (found, gradients):
        assert torch.allclose(one, other, atol=1e-2 * float(other.detach().abs().max()))


def test_the_command(made: Made, two_layers: Path, tmp_path: Path) -> None:
    output = tmp_path / "again"
    text = demo_text("calibration")
    result = CliRunner().invoke(app, [
        "refine", str(made.folder), "--base", str(two_layers), "--calibration", str(text), "--tokens", "640",
        "--window", str(WINDOW), "--loss", "rilq", "--adapter", str(made.folder / "eora"), "--out", str(output),
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "by rilq on 640 tokens" in " ".join(result.output.split())
    inspected = CliRunner().invoke(app, ["inspect", str(output)])
    assert "errors of single modules are not known" in " ".join(inspected.output.split())
    refused = CliRunner().invoke(app, [
        "refine", str(made.folder), "--base", str(two_layers), "--calibration", str(text), "--tokens", "640",
        "--window", str(WINDOW), "--adapter", str(output), "--out", str(output),
    ])  # fmt: skip
    assert refused.exit_code == 2 and "Name another folder" in " ".join(refused.output.split())


def test_too_little_calibration_is_refused_before_quantising(two_layers: Path, calibration: Batches) -> None:
    model = GPTQModel.load(str(two_layers), QuantizeConfig(bits=2, group_size=64))
    with pytest.raises(ValueError, match="has 1024 tokens"):
        model.quantize(calibration, adapter=EoRA(rank=8, refine="160k"))
