"""A model whose weights stay in its checkpoint's files until a part of it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

Read = Callable[[str], torch.Tensor]


class Weights(Protocol):
    """Where the tensors of a model come from that are not in memory."""

    def opened(self) -> Any:
        """A context that gives a function from a parameter's name to its tensor, on the CPU.

        The function raises KeyError for a name that there is nothing of.
        """
        ...


class CheckpointWeights:
    """Tensors of a folder of safetensors files, by the names that they have there.

    Args:
        folder: of the checkpoint.

    Raises:
        FileNotFoundError: when there are no safetensors files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    @contextmanager
    def opened(self) -> Iterator[Read]:
        """Reads a tensor by its name; files are closed at the end, and with them their pages given back."""
        with ExitStack() as stack:
            files: dict[str, Any] = {}

            def read(name: str) -> torch.Tensor:
                file = self.files[name]
                if file not in files:
                    files[file] = stack.enter_context(safe_open(self.folder / file, framework="pt"))
                # A copy, since what is mapped would stay with the file.
                tensor: torch.Tensor = files[file].get_tensor(name).clone()
                return tensor

            yield read


def _files(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    if index.is_file():
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not (folder / SINGLE).is_file():
        raise FileNotFoundError(
            f"EoRA: `{folder}` holds neither `{INDEX}` nor `{SINGLE}`. A budget reads weights layer by layer from "
            f"safetensors files; save the model with `save_pretrained`, or name a rank in place of the budget."
        )
    with safe_open(folder / SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), SINGLE)


def skeleton(folder: Path, *, trust_remote_code: bool = False) -> torch.nn.Module:
    """A checkpoint's causal language model without its parameters, which are on the meta device. Buffers are there.

    Args:
        folder: with `config.json`.
        trust_remote_code: whether model code beside it may run.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    with init_empty_weights(include_buffers=False):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    # Inside that context every parameter became one of its own.
    model.tie_weights()  # type: ignore[operator]
    return model.eval()
