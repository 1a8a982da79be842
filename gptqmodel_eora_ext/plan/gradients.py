"""Gradients of a model's loss at the outputs of its modules, layer by layer: one sweep forward, one back.

The sweep forward keeps the input of every layer. The sweep back runs a layer again from its input, with gradients, from
what the layer after it handed down. So one layer's weights and activations are in memory at a time, and the inputs of
all layers, in memory or on disk (`system.spill`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..system.memory import release_free_memory
from ..system.spill import Spill
from .layered import LayeredModel, Window
from .rows import OutputGradients

# Tokens whose scores are in memory at a time: 256 of 152,000 labels take 156 MB in float32.
HEAD_TOKENS = 256

Progress = Callable[[Sequence[Any]], Iterable[Any]]


def measure_gradients(
    model: LayeredModel,
    modules: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    found: Callable[[int, Mapping[str, torch.Tensor]], None],
    *,
    spill: Spill,
    kind: str = "fisher",
    seed: int = 0,
    progress: Progress = iter,
) -> None:
    """Take the gradient of the loss at every module's output, at every token that counts.

    Args:
        model: run layer by layer.
        modules: full names of linear layers.
        batches: `input_ids` (and `attention_mask`), windows × tokens each; each is one forward.
        found: called with the index of a layer and the gradients of its modules, tokens × out each in the dtype that
            they were computed in, from the last layer to the first. What no token reached is not there.
        spill: keeps the inputs of layers.
        kind: "fisher": labels sampled from the model; "empirical": the text's own.
        seed: of the sampling.
        progress: wraps the steps, two a layer.
    """
    windows = model.begin(batches)
    count = len(model)
    inputs = [[spill.keep(window.hidden)] for window in windows]
    gradients: list[torch.Tensor] = []
    for step in progress(range(2 * count)):
        index = step if step < count else 2 * count - 1 - step
        with model.layer(index) as layer:
            if step < count:
                with torch.no_grad():
                    for window, kept in zip(windows, inputs, strict=True):
                        window.hidden = model.run(layer, index, window.hidden, window)
                        if index < count - 1:
                            kept.append(spill.keep(window.hidden))
            else:
                if not gradients:
                    gradients = _gradients_of_outputs(model, windows, kind, seed)
                of_layer = _of(modules, model.layers[index])
                linears: Mapping[str, Any] = {name: model.model.get_submodule(name) for name in of_layer}
                with OutputGradients(model.layers[index], layer, linears) as watch:
                    for position, window in enumerate(windows):
                        watch.keep = window.keep
                        given = inputs[position].pop()
                        hidden = spill.read(given, model.device).detach().requires_grad_()
                        with torch.enable_grad():
                            output = model.run(layer, index, hidden, window)
                        output.backward(gradients[position])
                        assert hidden.grad is not None
                        gradients[position] = hidden.grad
                        spill.drop(given)
                found(index, {name: torch.cat(rows) for name, rows in watch.gradients.items()})
        release_free_memory()


def _of(modules: Sequence[str], layer: str) -> list[str]:
    return [name for name in modules if name.startswith(f"{layer}.")]


def _gradients_of_outputs(model: LayeredModel, windows: Sequence[Window], kind: str, seed: int) -> list[torch.Tensor]:
    """Of the cross entropy with sampled or given labels at the output of the last layer, windows × tokens × width."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    with model.head() as head:
        for window in windows:
            hidden, ids = window.hidden, window.ids
            # The token before one that counts is scored by it; the last has no label.
            scored = torch.zeros_like(window.keep)
            scored[:, :-1] = window.keep[:, 1:]
            labels = torch.zeros_like(ids)
            labels[:, :-1] = ids[:, 1:]
            drawn = torch.rand(ids.shape, generator=generator).to(model.device)
            flat = hidden.reshape(-1, hidden.shape[-1])
            parts = [
                _gradient(head, *one, sampled=kind == "fisher")
                for one in zip(
                    *(each.split(HEAD_TOKENS) for each in (flat, labels.flatten(), scored.flatten(), drawn.flatten())),
                    strict=True,
                )
            ]
            found.append(torch.cat(parts).view_as(hidden))
            window.hidden = hidden.new_empty(0)
    return found


def _gradient(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    scored: torch.Tensor,
    drawn: torch.Tensor,
    *,
    sampled: bool,
) -> torch.Tensor:
    """Of some tokens, tokens × width."""
    rows = hidden.detach().requires_grad_()
    with torch.enable_grad():
        scores = head(rows)
    with torch.no_grad():
        likely = scores.detach().to(torch.float32).softmax(-1)
        if sampled:
            # By the inverse of the distribution: one random number a token, where multinomial draws one a label.
            sums = likely.cumsum(-1)
            targets = torch.searchsorted(sums, drawn[:, None] * sums[:, -1:]).clamp_max(sums.shape[-1] - 1)
            del sums
        else:
            targets = labels[:, None]
        # Of the cross entropy, with no pass over all labels for its value.
        gradient = likely.scatter_add_(-1, targets, -torch.ones_like(targets, dtype=likely.dtype))
        gradient *= scored[:, None]
    scores.backward(gradient.to(scores.dtype))
    assert rows.grad is not None
    return rows.grad
