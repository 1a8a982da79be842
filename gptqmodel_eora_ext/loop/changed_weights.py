"""A model's files written anew with some of its weights changed, all else as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..system.spill import Kept, Spill

# What is not copied beside the weights: other formats of them, and what tells of the base alone.
LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md", ".index.json")


class ChangedWeights:
    """Keeps changed weights while a loop runs, and writes a model's files with them.

    Args:
        base: folder of the model as it was, with safetensors files.
        spill: where weights are kept.
    """

    def __init__(self, base: Path, spill: Spill) -> None:
        self._base = base
        self._spill = spill
        self._kept: dict[str, Kept] = {}
        self._files = sorted(base.glob("*.safetensors"))

    def check(self, names: Iterable[str]) -> None:
        """Refuse tensors that the files do not hold under these names.

        Raises:
            NotImplementedError: naming the first.
        """
        held = {key for path in self._files for key in _keys(path)}
        missing = next((name for name in names if name not in held), None)
        if missing is not None:
            raise NotImplementedError(
                f"EoRA: the files of `{self._base}` hold no tensor {missing}: transformers renames it, or makes it of "
                f"others, when it loads the model, so that its pruned form has no place in them. Save the model with "
                f"`save_pretrained`, and prune that; experts that lie in one tensor cannot be pruned here."
            )

    def keep(self, name: str, weight: torch.Tensor) -> None:
        """Keep a copy of a weight, in the form in which the files hold it."""
        self._kept[name] = self._spill.keep(weight)

    def write(self, folder: Path) -> None:
        """Write the model into an empty folder. One of its files is in memory at a time.

        Weights take the dtype that they have in the base's files.

        Raises:
            OSError: when a file cannot be written.
            ValueError: for a weight of another shape than the base's.
        """
        for path in self._files:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {key: self._tensor(key, file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
            save_file(tensors, folder / path.name, metadata=metadata)
        for path in sorted(self._base.iterdir()):
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(LEFT_OUT):
                shutil.copyfile(path, folder / path.name)
        for index in self._base.glob("*.safetensors.index.json"):
            # Read and written, since the hub's cache may hold a link.
            (folder / index.name).write_text(json.dumps(json.loads(index.read_text(encoding="utf-8")), indent=2))

    def _tensor(self, key: str, original: torch.Tensor) -> torch.Tensor:
        if key not in self._kept:
            return original
        found = self._spill.read(self._kept[key])
        if found.shape != original.shape:
            raise ValueError(f"EoRA: {key} is {tuple(found.shape)} now, {tuple(original.shape)} in the base's files.")
        return found.to(original.dtype).contiguous()


def _keys(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
