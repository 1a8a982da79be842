"""The table of GPTQModel's methods: complete, as the docs show it, and what the code does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization import config as host
from gptqmodel.quantization.config import METHOD

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.formats.names import ADAPTER_DETAILS, QUANTIZE_CONFIG
from gptqmodel_eora_ext.hosts.gptqmodel.generate import generate_adapter
from gptqmodel_eora_ext.hosts.gptqmodel.methods import ROTATION, SERVICES, table
from gptqmodel_eora_ext.hosts.terminal import quiet
from tests.e2e.helpers import Batches, distances, load

DOCS = Path(__file__).parents[2] / "docs" / "foreign.md"
CONFIGS: dict[METHOD, Any] = {
    METHOD.FP8: host.FP8Config,
    METHOD.GGUF: host.GGUFConfig,
    METHOD.PARO: host.ParoConfig,
    METHOD.BITSANDBYTES: host.BitsAndBytesConfig,
    METHOD.EXL3: host.EXL3Config,
    METHOD.VPTQ: host.VPTQConfig,
}


def test_every_method_of_the_host_is_in_the_table() -> None:
    assert set(SERVICES) == set(METHOD)
    for one in SERVICES.values():
        assert bool(one.reason) == (not one.in_loop or one.backend is None)


def test_the_docs_show_the_table() -> None:
    shown = DOCS.read_text(encoding="utf-8").partition("<!-- methods -->")[2].partition("<!-- /methods -->")[0]
    rows = ["| method | in the loop | finished checkpoint | why not, and what works |", "|---|---|---|---|"]
    rows += [f"| {' | '.join(row)} |" for row in table()]
    assert [line.rstrip() for line in shown.strip().splitlines()] == [row.rstrip() for row in rows]


@pytest.mark.parametrize("method", [method for method, one in SERVICES.items() if not one.in_loop])
def test_what_is_not_served_in_the_loop_says_why(method: METHOD, two_layers: Path, calibration: Batches) -> None:
    with quiet():
        model = GPTQModel.load(str(two_layers), CONFIGS[method]())
        with pytest.raises(NotImplementedError) as caught:
            model.quantize(calibration, adapter=EoRA(rank=4))
    assert SERVICES[method].reason in str(caught.value) and f"`{method.value}`" in str(caught.value)


def test_rotation_is_refused(two_layers: Path, calibration: Batches) -> None:
    with quiet():
        model = GPTQModel.load(str(two_layers), QuantizeConfig(bits=4, group_size=64, rotation="hadamard"))
        with pytest.raises(NotImplementedError, match="an adapter for turned weights was never tried") as caught:
            model.quantize(calibration, adapter=EoRA(rank=4))
    assert ROTATION in str(caught.value)


@pytest.mark.parametrize("method", [method for method, one in SERVICES.items() if one.backend is None])
def test_finished_checkpoints_that_are_not_served_say_why(
    method: METHOD, two_layers: Path, calibration: Batches, tmp_path: Path
) -> None:
    """The config is the host's own; no weights are read before the refusal."""
    folder = Path(shutil.copytree(two_layers, tmp_path / "checkpoint"))
    with quiet():
        CONFIGS[method]().save_pretrained(str(folder))
    assert (folder / QUANTIZE_CONFIG).is_file()
    with pytest.raises(NotImplementedError) as caught, quiet():
        generate_adapter(EoRA(rank=4), str(two_layers), folder, calibration)
    assert SERVICES[method].reason in str(caught.value)


@pytest.mark.formats
@pytest.mark.parametrize("method", [METHOD.FP8, METHOD.GGUF])
def test_finished_checkpoints_of_more_methods(
    method: METHOD, two_layers: Path, calibration: Batches, tmp_path: Path
) -> None:
    """ParoQuant, QQQ and VPTQ were run on a random model: SmolLM2 is too narrow for their kernels, or they are slow."""
    folder = tmp_path / "checkpoint"
    with quiet():
        model = GPTQModel.load(str(two_layers), CONFIGS[method]())
        model.quantize(calibration)
        model.save(str(folder))
        made = generate_adapter(EoRA(rank=16), str(two_layers), folder, calibration, batch_size=4)
    modules = json.loads((made / ADAPTER_DETAILS).read_text())["modules"]
    assert len(modules) == 14
    assert all(one["error_after"] < 0.8 * one["error_before"] for one in modules.values())
    with_adapter, without = distances(two_layers, load(folder, backend="auto").to(torch.float32), calibration)
    assert with_adapter < 0.9 * without
