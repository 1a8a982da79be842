"""A GGUF model as `refine` takes it: transformers' model of the base, its weights and embedding out of the file.

Dequantising a K-quant takes numpy many times as long as multiplying with it, so it is done once, into a file of 16-bit
weights that is mapped into memory: two bytes a weight on disk, of which the system keeps as much in memory as it likes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from ...adapter.layers import layer_number, shape_of
from ...formats.gguf.model import FLOATING
from ...formats.mapped import mapped_tensors
from ...plan.checkpoint import CheckpointWeights, skeleton
from ...plan.layered import LayeredModel
from ...refine import FrozenWeight, Trainee
from ...refine.run import activation_dtype
from ...refine.teacher import base_folder
from ...system.distributed import by_first
from ...system.files import replaced_file
from .weights import GGUFWeights

EMBEDDING = "token_embd.weight"


class MappedWeight(FrozenWeight):
    """A dequantised weight in a mapped file.

    Args:
        weight: out × in.
        bias: of length out, or None.
        device: where it is multiplied.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device) -> None:
        self._weight, self._device, self.bias = weight, device, bias
        self.out_features, self.in_features = weight.shape

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """See `FrozenWeight`. On the CPU it is the mapped file itself, which nothing writes to."""
        return self._weight.to(self._device, dtype).T


class LocatedModel:
    """A base's model without its weights, and where those of its linear layers lie in a quantised file.

    Args:
        weights: of the file.
        base: the full-precision model, a folder or a hub name.
        trust_remote_code: whether model code from the hub may run.

    Raises:
        ValueError: where the file is not of this model.
        NotImplementedError: for quantised tensors that no linear layer of transformers' model stands for (experts).
    """

    def __init__(self, weights: GGUFWeights, base: str, *, trust_remote_code: bool = False) -> None:
        folder = base_folder(base)
        self._weights, self._base = weights, base
        self._model = skeleton(folder, trust_remote_code=trust_remote_code)
        self._files = CheckpointWeights(folder)
        linears = _linears(self._model)
        self._layered = LayeredModel(self._model, self._files, list(linears))
        shapes = [shape_of(name, one) for name, one in linears.items()]
        self._known = weights.known(shapes, self._layered.weight)
        self._check_served()

    def _check_served(self) -> None:
        """Refuse a file with quantised tensors that would be left as they are in the base."""
        model = self._weights.model
        served = {one.place.tensor for one in self._weights.placed.values()}
        left_out = next((info for info in model.linear() if info.name not in served), None)
        if left_out is not None:
            raise NotImplementedError(
                f"EoRA: `{model.path}` holds {left_out.name} ({left_out.type}), which is no linear layer of "
                f"{type(self._model).__name__} by itself, as experts in one tensor are not. Such a model cannot be "
                f"refined; use the adapter of `eora generate` as it is."
            )

    def trainee(self, kept: Path, device: str | None, report: Callable[[int, int], None]) -> Trainee:
        """The model that llama.cpp runs, but for its own rounding of activations and of the output matrix.

        Linear layers and the embedding have the file's values. Norms, biases and the output matrix are the base's, so
        that scores of the full-precision model are formed by its own matrix; llama.cpp has it in 5 or 6 bits.

        Args:
            kept: file for the dequantised weights; one that is there was made by an earlier call.
            device: where the model is run; None for the CPU.
            report: called with (modules dequantised, modules in all).

        Raises:
            ValueError: where a module's weight or the embedding is not of this model.
            NotImplementedError: for a base whose weights cannot be read layer by layer.
        """
        where = torch.device(device or "cpu")

        def dequantize() -> None:
            if not kept.is_file():
                self._dequantize(kept, activation_dtype(where), report)

        by_first(dequantize)
        for name in self._known:
            # Its place is kept for the bias, which is read with all that is not quantised.
            self._model.get_submodule(name).register_parameter("weight", None)
        self._files.fill(self._model, "")
        self._embed()
        model = self._model.to(where)
        file = safe_open(kept, framework="pt")
        found: dict[str, FrozenWeight] = {}
        for name in self._known:
            bias: torch.Tensor | None = model.get_submodule(name).bias  # type: ignore[assignment]
            found[name] = MappedWeight(file.get_tensor(name), None if bias is None else bias.detach(), where)
        return Trainee(model, found)

    def _dequantize(self, kept: Path, dtype: torch.dtype, report: Callable[[int, int], None]) -> None:
        """Write Ŵ of all modules, out × in in the model's order of rows."""
        shapes = {name: self._weights.placed[name].shape for name in self._known}
        wanted = {name: (dtype, (one.out_features, one.in_features)) for name, one in shapes.items()}
        with replaced_file(kept) as unfinished:
            for done, (name, tensor) in enumerate(mapped_tensors(unfinished, wanted).items()):
                report(done, len(wanted))
                tensor.copy_(self._known[name](self._layered.weight(name)))
        report(len(wanted), len(wanted))

    def _embed(self) -> None:
        """Give the model the embedding of the file, which is rounded, too."""
        embedding: torch.nn.Module = self._model.get_input_embeddings()  # type: ignore[operator]
        table: torch.Tensor = embedding.weight  # type: ignore[assignment]
        file = self._weights.model
        info = file.tensors.get(EMBEDDING)
        if info is None or info.type in FLOATING:
            return
        if info.shape[-1] != table.shape[-1] or info.shape[0] < len(table):
            raise ValueError(
                f"EoRA: `{file.path}`: {EMBEDDING} is {' × '.join(map(str, info.shape))}, the embedding of "
                f"`{self._base}` {' × '.join(map(str, table.shape))}. Name the full-precision model that the file was "
                f"made from."
            )
        values = file.read(EMBEDDING, range(len(table))).to(table.dtype)
        # A parameter of its own, so that an output matrix that was tied to it keeps its values.
        embedding.weight = torch.nn.Parameter(values, requires_grad=False)


def _linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers inside the model's layers, by full name."""
    return {
        name: one
        for name, one in model.named_modules()
        if isinstance(one, torch.nn.Linear) and layer_number(name) is not None
    }
