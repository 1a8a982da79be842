"""Refinement through GPTQModel: when a checkpoint is saved, by the command, and on what is loaded afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.cli import app
from gptqmodel_eora_ext.evaluate.demo import demo_text
from gptqmodel_eora_ext.evaluate.divergence import summed_divergence
from gptqmodel_eora_ext.formats.names import ADAPTER_WEIGHTS
from gptqmodel_eora_ext.hosts.gptqmodel.trainable import open_trainee

from .helpers import Batches, Made, load, quantize

pytestmark = pytest.mark.e2e

WINDOW, SETTINGS = 64, {"tokens": 16 * 64, "window": 64, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def made(two_layers: Path, calibration: Batches, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two layers of SmolLM2 at 2 bits, refined when they are saved."""
    folder = tmp_path_factory.mktemp("refined") / "model"
    adapter = EoRA(rank=16, factor_bits=4, refine=SETTINGS)
    return quantize(two_layers, folder, QuantizeConfig(bits=2, group_size=64), calibration, adapter=adapter)


def test_saving_refines_and_names_the_result(made: Made) -> None:
    entry = json.loads((made.folder / "quantize_config.json").read_text())["adapter"]
    assert entry == {"name": "eora", "path": "eora-refined", "rank": 16}
    first, refined = (load_file(made.folder / name / ADAPTER_WEIGHTS) for name in ("eora", "eora-refined"))
    assert {name: (one.shape, one.dtype) for name, one in first.items()} == {
        name: (one.shape, one.dtype) for name, one in refined.items()
    }
    told = json.loads((made.folder / "eora-refined" / "eora.json").read_text())["refinement"]
    assert told["after"] < told["before"] and 0 < told["best_step"] <= told["steps"] <= 13


def test_the_loaded_model_is_nearer_to_full_precision(made: Made, two_layers: Path, token_ids: list[int]) -> None:
    """On text that neither trained nor validated."""
    ids = torch.tensor([token_ids[4000:4400]])
    wanted = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.float32)(ids).logits[0].detach()

    def divergence(adapter: str) -> float:
        model = GPTQModel.load(str(made.folder), adapter=EoRA(path=made.folder / adapter)).model
        with torch.inference_mode():
            return summed_divergence(wanted, model(ids).logits[0].float())

    assert divergence("eora-refined") < divergence("eora")


def test_a_gradient_reaches_the_input_through_the_kernel(made: Made) -> None:
    """What trains sees the weight that the kernels multiply with."""
    trainee = open_trainee(made.folder)
    loaded = load(made.folder)
    name, weight = next(iter(trainee.weights.items()))
    x = torch.randn(40, weight.in_features, dtype=torch.bfloat16)
    kernel = loaded.get_submodule(name)
    kernel.adapter = None
    with torch.no_grad():
        expected = kernel(x).float()
    found = (x @ weight.dense(torch.bfloat16)).float()
    assert torch.allclose(found, expected, atol=0.02 * float(expected.abs().max()))


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
