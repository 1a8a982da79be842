"""A model whose weights AutoRound keeps on disk, to be run layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from auto_round.special_model_handler import update_module
from auto_round.utils.disk_stream_util import get_safetensors_index, materialize_module, unfuse_meta_moe_

from ...plan.checkpoint import CheckpointWeights, skeleton


class DiskWeights(CheckpointWeights):
    """Tensors of a checkpoint, by AutoRound's own reader, which knows where a model's experts lie in it.

    Args:
        folder: of the checkpoint.

    Raises:
        FileNotFoundError: when there are no safetensors files.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._index: Any = get_safetensors_index(str(folder))

    def fill(self, model: torch.nn.Module, name: str) -> None:
        """See `Weights`."""
        materialize_module(model.get_submodule(name), name, self._index, "cpu")
        # It leaves out what is tied, and only warns of what it does not find.
        super().fill(model, name)


def shell(folder: Path, *, trust_remote_code: bool = False) -> torch.nn.Module:
    """A checkpoint's model without its weights, its experts taken apart as AutoRound does."""
    model = skeleton(folder, trust_remote_code=trust_remote_code)
    unfuse_meta_moe_(model)
    # The former leaves types to the latter for which AutoRound has modules of its own (GPT-OSS).
    updated: torch.nn.Module = update_module(model)
    return updated
