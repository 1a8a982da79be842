"""AutoRound's exports, served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.vllm_reference import dense_model
from benchmarks.vllm_tools import Server
from gptqmodel_eora_ext.hosts.jobs import QuantizeJob
from gptqmodel_eora_ext.hosts.registry import quantizer
from gptqmodel_eora_ext.hosts.terminal import quiet
from tests.vllm.test_serving import TOKENS, check

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(("form", "symmetric"), (("auto_round", True), ("auto_gptq", False)))
def test_an_export_is_served(
    form: str, symmetric: bool, server: Server, two_layers: Path, calibration: list[dict[str, list[int]]],
    prompts: list[list[int]], tmp_path: Path,
) -> None:  # fmt: skip
    settings = {"bits": 2, "group_size": 64, "sym": symmetric, "iters": 2, "format": form}
    job = QuantizeJob(str(two_layers), tmp_path / "out", calibration, settings, {"rank": 16}, batch_size=4)
    with quiet(), torch.compiler.set_stance("force_eager"):
        quantizer("autoround")(job)
    models = [dense_model(job.output, "own")] * len(prompts)
    check(server.ask(job.output, prompts, losses=True, tokens=TOKENS), prompts, models)
