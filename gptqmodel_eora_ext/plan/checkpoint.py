"""A model whose weights stay in its checkpoint's files until a part of it is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Weights(Protocol):
    """Where a model's tensors are read from, as long as they are on the meta device and not in memory."""

    def fill(self, model: torch.nn.Module, name: str) -> None:
        """Read every tensor of a module that is on the meta device. It lies on the CPU then, in the dtype it had.

        Args:
            model: the model, of which the rest stays as it is.
            name: full name of the module; the modules inside it are read, too.

        Raises:
            NotImplementedError: for a tensor that the source does not hold in the model's shape.
        """
        ...

    def samples(self, rows: int) -> Iterator[tuple[str, Sequence[int], torch.Tensor]]:
        """Yield name, shape and ``rows`` rows of every tensor, by which one model is told from another."""
        ...


class CheckpointWeights:
    """Reads tensors from a folder of safetensors files, by the names that they have there.

    Args:
        folder: the checkpoint's folder.

    Raises:
        FileNotFoundError: when there are no safetensors files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)

    def fill(self, model: torch.nn.Module, name: str) -> None:
        """See `Weights`. A tied tensor has several names in the model; the files may hold it under any of them."""
        names: dict[int, list[str]] = {}
        every: list[tuple[str, torch.Tensor]] = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(),
        ]
        for known, one in every:
            names.setdefault(id(one), []).append(known)
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for owner in model.get_submodule(name).modules():
                stores: tuple[dict[str, Any], dict[str, Any]] = owner._parameters, owner._buffers
                for store in stores:
                    for key, tensor in list(store.items()):
                        if tensor is None or not tensor.is_meta:
                            continue
                        found = self._read(names[id(tensor)], tensor, files, stack)
                        is_parameter = isinstance(tensor, torch.nn.Parameter)
                        store[key] = torch.nn.Parameter(found, requires_grad=False) if is_parameter else found

    def _read(
        self, names: Sequence[str], tensor: torch.Tensor, files: dict[str, Any], stack: ExitStack
    ) -> torch.Tensor:
        """Read the tensor of one of these names, in the dtype of ``tensor``.

        Files that are opened for it are kept in ``files``, for the next tensor, and closed by ``stack``.
        """
        name = next((one for one in names if one in self.files), None)
        if name is None:
            raise NotImplementedError(
                f"EoRA: the checkpoint holds no tensor {' or '.join(names)}, which the model has. Transformers may "
                f"convert it when it loads the whole model; layer by layer it cannot be read. Name a rank in place of "
                f"the budget."
            )
        file = self.files[name]
        if file not in files:
            files[file] = stack.enter_context(safe_open(self.folder / file, framework="pt"))
        found: torch.Tensor = files[file].get_tensor(name)
        if found.shape != tensor.shape:
            raise NotImplementedError(
                f"EoRA: {name} is {tuple(found.shape)} in the checkpoint and {tuple(tensor.shape)} in the model, so it "
                f"cannot be read layer by layer. Name a rank in place of the budget."
            )
        # A copy: the tensor that was read is a view of the mapped file, and would keep all of it mapped.
        return found.to(dtype=tensor.dtype, copy=True)

    def samples(self, rows: int) -> Iterator[tuple[str, Sequence[int], torch.Tensor]]:
        """See `Weights`; no other rows are read from the files."""
        by_file: dict[str, list[str]] = {}
        for name in sorted(self.files):
            by_file.setdefault(self.files[name], []).append(name)
        for file, names in by_file.items():
            with safe_open(self.folder / file, framework="pt") as opened:
                for name in names:
                    part = opened.get_slice(name)
                    shape = part.get_shape()
                    places = sampled_rows(shape, rows)
                    some = [part[place : place + 1] for place in places] if places else [opened.get_tensor(name)]
                    yield name, shape, torch.cat(some) if places else some[0]


def sampled_rows(shape: Sequence[int], rows: int) -> list[int]:
    """Indices of ``rows`` rows, evenly from the first to the last; none for a tensor that has no rows."""
    last = shape[0] - 1 if shape else -1
    return sorted({last * place // max(rows - 1, 1) for place in range(rows)}) if last >= 0 else []


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
    """Make a checkpoint's causal language model without reading its weights.

    Parameters are on the meta device, where they take no memory; buffers (rotary frequencies) have their values.

    Args:
        folder: the checkpoint's folder, with `config.json`.
        trust_remote_code: whether model code that comes with the checkpoint may run.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    with init_empty_weights(include_buffers=False):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    # `init_empty_weights` makes every parameter a new one, also those that are tied; so they are tied again.
    model.tie_weights()  # type: ignore[operator]
    return model.eval()
