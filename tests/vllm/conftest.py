"""Checkpoints of the first two layers of SmolLM2, and one server that serves them one after another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.vllm_tools import MISSING, Server, is_installed
from tests.conftest import SEQLEN


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """vLLM with the plugin."""
    if not is_installed():
        pytest.skip(MISSING)
    with Server() as running:
        yield running


@pytest.fixture(scope="session")
def prompts(token_ids: list[int]) -> list[list[int]]:
    """Texts that calibration did not see; two lengths, on both sides of a kernel's change of path."""
    return [token_ids[20 * SEQLEN : 20 * SEQLEN + 100], token_ids[30 * SEQLEN : 30 * SEQLEN + 20]]


class Checkpoints:
    """Makes checkpoints when they are first asked for."""

    def __init__(self, base: Path, home: Path, calibration: list[dict[str, list[int]]]) -> None:
        self._base, self._home, self._calibration = base, home, calibration

    def __call__(self, name: str, adapter: dict[str, Any] | None, **config: Any) -> Path:
        """A checkpoint by GPTQModel's GPTQ.

        Args:
            name: of its folder.
            adapter: of `EoRA`; None for none.
            config: of `QuantizeConfig`.
        """
        from gptqmodel import GPTQModel, QuantizeConfig

        from gptqmodel_eora_ext import EoRA
        from gptqmodel_eora_ext.hosts.terminal import quiet

        folder = self._home / name
        if not folder.exists():
            wanted = {} if adapter is None else {"adapter": EoRA(**adapter)}
            with quiet(), torch.compiler.set_stance("force_eager"):
                host = GPTQModel.load(str(self._base), QuantizeConfig(**config))
                host.quantize(self._calibration, batch_size=4, **wanted)
                host.save(str(folder))
        return folder

    def adapter(self, name: str, checkpoint: Path, **options: Any) -> Path:
        """An adapter for a checkpoint, in a folder of its own."""
        from gptqmodel import GPTQModel

        from gptqmodel_eora_ext import EoRA
        from gptqmodel_eora_ext.hosts.terminal import quiet

        folder = self._home / name
        if not folder.exists():
            with quiet(), torch.compiler.set_stance("force_eager"):
                GPTQModel.adapter.generate(
                    adapter=EoRA(path=str(folder), **options), model_id_or_path=str(self._base),
                    quantized_model_id_or_path=str(checkpoint), calibration_dataset=self._calibration, batch_size=4,
                )  # fmt: skip
        return folder


@pytest.fixture(scope="session")
def checkpoints(
    two_layers: Path, tmp_path_factory: pytest.TempPathFactory, calibration: list[dict[str, list[int]]]
) -> Checkpoints:
    return Checkpoints(two_layers, tmp_path_factory.mktemp("checkpoints"), calibration)
