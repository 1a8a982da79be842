"""A quantised model whose factors are trained: layers run one after another, each once more on the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..plan.layered import LayeredModel
from .factors import TrainedFactors
from .linear import FrozenWeight, TrainedLinear
from .losses import Head


@dataclass(frozen=True)
class Trainee:
    """A quantised model in memory, as a host offers it for training.

    Attributes:
        model: transformers' causal language model.
        weights: full name of a quantised module → its weight.
    """

    model: Any
    weights: Mapping[str, FrozenWeight]


class Student:
    """Runs a `Trainee` with factors that learn. `close` puts the host's modules back.

    In memory beside the packed weights and the factors are the input of every layer for one window, and on the way back
    one layer's activations and its Ŵ in the dtype of the activations.

    Attributes:
        layered: the model, to be run layer by layer.
        factors: those that learn.
        vocabulary: scores a token.
        device: of all of it.

    Args:
        trainee: the model; its quantised modules are replaced until `close`.
        factors: on the model's device.
        dtype: of the activations. Parameters outside the quantised modules are converted to it until `close`.

    Raises:
        NotImplementedError: for a model that cannot be run layer by layer.
    """

    def __init__(self, trainee: Trainee, factors: TrainedFactors, dtype: torch.dtype) -> None:
        self.model, self.factors = trainee.model, factors
        self.device = factors.master.device
        self._replaced = {name: self.model.get_submodule(name) for name in trainee.weights}
        self.layered = LayeredModel(self.model, None, list(trainee.weights), self.device)
        self._layers = [self.model.get_submodule(name) for name in self.layered.layers]
        for name, weight in trainee.weights.items():
            learned = factors.parameters(name)
            self.model.set_submodule(name, TrainedLinear(weight, learned, along_rank=factors.layout.along_rank))
        self.model.eval()
        # Parameters alone: buffers, such as the frequencies of rotary embeddings, keep the digits they have.
        self._parameters = [(one, one.data, one.requires_grad) for one in self.model.parameters()]
        for parameter, data, _ in self._parameters:
            parameter.requires_grad_(False)
            parameter.data = data.to(dtype)
        self.vocabulary = int(self.model.get_output_embeddings().weight.shape[0])

    def close(self) -> None:
        """Put the host's modules back, and its parameters as they were."""
        for name, module in self._replaced.items():
            self.model.set_submodule(name, module)
        for parameter, data, learned in self._parameters:
            parameter.data = data
            parameter.requires_grad_(learned)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Outputs of the last layer, tokens × width, of a window's tokens; with autograd's graph where grad is on."""
        (window,) = self.layered.begin([{"input_ids": ids[None]}])
        hidden = window.hidden
        for index, layer in enumerate(self._layers):
            if torch.is_grad_enabled():
                hidden = checkpoint(
                    self.layered.run, layer, index, hidden, window, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = self.layered.run(layer, index, hidden, window)
        return hidden[0]

    @contextmanager
    def head(self) -> Iterator[Head]:
        """Yield what stands after the last layer."""
        with after_layers(self.layered) as head:
            yield head


@contextmanager
def after_layers(layered: LayeredModel) -> Iterator[Head]:
    """Yield a function from outputs of the last layer to hidden states after the final norm, and scores.

    The states are what the output matrix is given, whatever the model calls its norm.
    """
    seen: list[torch.Tensor] = []
    matrix: torch.nn.Module = layered.model.get_output_embeddings()  # type: ignore[operator]
    handle = matrix.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        with layered.head() as scores:

            def head(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                seen.clear()
                found = scores(rows)
                return seen[0][0], found

            yield head
    finally:
        handle.remove()
