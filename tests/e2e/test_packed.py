"""Packed factors through GPTQModel: quantise, save, load, apply, save again, export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from typer.testing import CliRunner

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.autoload import OFF_SWITCH
from gptqmodel_eora_ext.cli import app
from gptqmodel_eora_ext.formats.names import ADAPTER_WEIGHTS
from gptqmodel_eora_ext.hosts.terminal import quiet

from .helpers import Batches, Made, kernels, load, measured_errors, quantize
from .test_checkpoint import logits

pytestmark = pytest.mark.e2e

LOAD = "import sys; from gptqmodel import GPTQModel; GPTQModel.load(sys.argv[1])"


@pytest.fixture(scope="module")
def made(two_layers: Path, calibration: Batches, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("packed") / "model"
    dynamic = {r"+:.*k_proj": {"adapter": {"rank": 8}}}
    config = QuantizeConfig(bits=2, group_size=64, dynamic=dynamic)
    return quantize(two_layers, folder, config, calibration, adapter=EoRA(rank=32, factor_bits=4))


def test_saved_packed_and_named_for_the_plugin(made: Made) -> None:
    config = json.loads((made.folder / "quantize_config.json").read_text())
    assert config["adapter"] == {"name": "eora", "path": "eora", "rank": 32}
    tensors = load_file(made.folder / "eora" / ADAPTER_WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.uint8, torch.float16}
    reports = json.loads((made.folder / "eora" / "eora.json").read_text())["modules"]
    assert sum(report["bytes"] for report in reports.values()) == sum(tensor.nbytes for tensor in tensors.values())


def test_loaded_and_applied(made: Made, token_ids: list[int]) -> None:
    model = load(made.folder)
    prompt = token_ids[2000:2100]
    for name, kernel in kernels(model).items():
        assert kernel.adapter.rank == made.factors[name].rank == (8 if "k_proj" in name else 32)
    with_adapter = logits(model, prompt)
    for kernel in kernels(model).values():
        kernel.adapter = None
    assert not torch.equal(with_adapter, logits(model, prompt))


def test_a_loaded_model_is_saved_with_the_very_same_factors(made: Made, tmp_path: Path) -> None:
    with quiet():
        GPTQModel.load(str(made.folder)).save(str(tmp_path / "again"))
    first, again = (load_file(folder / "eora" / ADAPTER_WEIGHTS) for folder in (made.folder, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_without_the_plugin_it_is_refused(made: Made, tmp_path: Path) -> None:
    """Not loaded without its adapter, which would be a far worse model and no word of it."""
    environment = {**os.environ, OFF_SWITCH: "1", "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(made.folder)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "Compatible adapters include" in done.stderr and "eora" in done.stderr


def test_exported_copy_gives_the_same_logits(made: Made, token_ids: list[int], tmp_path: Path) -> None:
    from gptqmodel.adapter.adapter import Lora

    done = CliRunner().invoke(app, ["export", str(made.folder), "--peft", str(tmp_path / "plain")])
    assert done.exit_code == 0, done.output
    prompt = token_ids[2000:2100]
    packed = logits(load(made.folder), prompt)
    plain = logits(load(made.folder, adapter=EoRA(path=tmp_path / "plain")), prompt)
    stock = logits(load(made.folder, adapter=Lora(rank=32, path=str(tmp_path / "plain"))), prompt)
    rms = packed.float().square().mean().sqrt()
    assert torch.equal(plain, stock)
    # Float16 holds a 4-bit code times its scale to 11 bits; both are applied in bfloat16.
    assert (packed - plain).abs().max() < 0.05 * rms


def test_generate_packs_too(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    with quiet():
        host = GPTQModel.load(str(two_layers), QuantizeConfig(bits=2, group_size=64))
        host.quantize(calibration, batch_size=4)
        host.save(str(tmp_path / "plain"))
        GPTQModel.adapter.generate(
            adapter=EoRA(rank=32, factor_bits=8, objective="output"),
            model_id_or_path=str(two_layers),
            quantized_model_id_or_path=str(tmp_path / "plain"),
            calibration_dataset=calibration,
            batch_size=4,
        )
    reports = json.loads((tmp_path / "plain" / "eora" / "eora.json").read_text())
    assert reports["objective"] == "output" and reports["factor_bits"] == 8
    found = measured_errors(two_layers, load(tmp_path / "plain"), calibration)
    for name, report in reports["modules"].items():
        assert found[name] == pytest.approx(report["error_after"], rel=0.05), name
