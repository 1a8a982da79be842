"""Gradients of a model's loss at the outputs of its modules, layer by layer: one sweep forward, one back.

The sweep forward keeps the input of every layer. The sweep back takes the layers from the last to the first: it runs
each again from its input, and takes the gradient that the layer after it handed down back through it. So one layer's
weights and activations are in memory at a time; the inputs of all layers lie in memory or on disk (`system.spill`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..system.distributed import current, share
from ..system.memory import release_free_memory
from ..system.spill import Spill
from .layered import LayeredModel, Window
from .rows import OutputGradients

# Tokens whose scores are in memory at a time: 256 of 152,000 labels take 156 MB in float32.
HEAD_TOKENS = 256

Progress = Callable[[Sequence[Any]], Iterable[Any]]


class GradientKeeper(Protocol):
    """Keeps a measurement's steps, so that an interrupted one is gone on with (`plan.kept_gradients`)."""

    def go_on(self, count: int) -> tuple[int, list[torch.Tensor]]:
        """The first step that is not finished, of two a layer, and the gradients that the last one has handed down."""
        ...

    def inputs(self, index: int) -> list[torch.Tensor]:
        """What enters a layer, of each window; of the number of layers, what comes out of the last."""
        ...

    def forward(self, index: int, outputs: list[torch.Tensor]) -> None:
        """Keep what comes out of a layer on the way forward."""
        ...

    def backward(self, index: int, gradients: list[torch.Tensor], count: int) -> None:
        """Keep what a layer hands down on the way back, when what was found of it is written."""
        ...


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
    keeper: GradientKeeper | None = None,
) -> None:
    """Take the gradient of the loss at every module's output, at every token that counts.

    Args:
        model: run layer by layer.
        modules: full names of linear layers.
        batches: `input_ids` (and `attention_mask`), windows × tokens each; each is one forward. Several processes
            share them out, and all of them hear of all gradients.
        found: called for each layer, from the last to the first, with its index and the gradients of its modules:
            tokens × out each, in the dtype that they were computed in. Modules that no token reached are left out.
        spill: keeps the inputs of layers.
        kind: "fisher": labels sampled from the model; "empirical": the text's own.
        seed: of the sampling.
        progress: wraps the steps, two a layer.
        keeper: keeps what each step has come to, and knows what an interrupted measurement has left.

    Raises:
        NotImplementedError: for a model that cannot be run layer by layer.
    """
    group = current()
    mine = range(len(batches)) if group is None else share(len(batches), group.size, group.rank)
    windows = model.begin(batches[mine.start : mine.stop])
    generator = torch.Generator().manual_seed(seed)
    for batch in batches[: mine.start]:
        # What other processes draw for their windows is passed over, so that labels are those of one process.
        torch.rand(batch["input_ids"].shape, generator=generator)
    count = len(model)
    inputs = [[spill.keep(window.hidden)] for window in windows]
    gradients: list[torch.Tensor] = []
    first = 0
    if keeper is not None:
        first, gradients = keeper.go_on(count)
        # On the way forward, the layer that comes next; on the way back, the layer to be gone through next.
        last = first if first <= count else 2 * count - 1 - first
        for before in range(1, last + 1):
            for window, kept, hidden in zip(windows, inputs, keeper.inputs(before), strict=True):
                window.hidden = hidden.to(model.device)
                if before < count:
                    kept.append(spill.keep(hidden))
    for step in progress(range(first, 2 * count)):
        index = step if step < count else 2 * count - 1 - step
        with model.layer(index) as layer:
            if step < count:
                with torch.no_grad():
                    for window, kept in zip(windows, inputs, strict=True):
                        window.hidden = model.run(layer, index, window.hidden, window)
                        if index < count - 1:
                            kept.append(spill.keep(window.hidden))
                if keeper is not None:
                    keeper.forward(index, [window.hidden for window in windows])
            else:
                if not gradients:
                    gradients = gradients_of_outputs(model, windows, kind, generator)
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
                gradients_of = {name: torch.cat(rows) for name, rows in watch.gradients.items()}
                found(index, gradients_of if group is None else group.joined_rows(gradients_of))
                if keeper is not None:
                    keeper.backward(index, gradients, count)
        release_free_memory()


def _of(modules: Sequence[str], layer: str) -> list[str]:
    return [name for name in modules if name.startswith(f"{layer}.")]


def gradients_of_outputs(
    model: LayeredModel, windows: Sequence[Window], kind: str, generator: torch.Generator
) -> list[torch.Tensor]:
    """Gradients of the cross entropy at the output of the last layer, windows × tokens × width for each of
    ``windows``, whose `hidden` is that output, and is let go of; labels are sampled ("fisher") or the text's own."""
    found = []
    with model.head() as head:
        for window in windows:
            hidden, ids = window.hidden, window.ids
            # A token's label is the token after it, so it is scored where that one counts. The last has no label.
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
    """Gradient of the cross entropy at the last layer's output of some tokens, tokens × width."""
    rows = hidden.detach().requires_grad_()
    with torch.enable_grad():
        scores = head(rows)
    with torch.no_grad():
        likely = scores.detach().to(torch.float32).softmax(-1)
        if sampled:
            # Labels are drawn by inverting the cumulated distribution, which takes one random number a token;
            # `torch.multinomial` draws one for each possible label.
            sums = likely.cumsum(-1)
            targets = torch.searchsorted(sums, drawn[:, None] * sums[:, -1:]).clamp_max(sums.shape[-1] - 1)
            del sums
        else:
            targets = labels[:, None]
        # The gradient of the cross entropy by the scores is p − onehot. Its value is not needed, nor computed.
        gradient = likely.scatter_add_(-1, targets, -torch.ones_like(targets, dtype=likely.dtype))
        gradient *= scored[:, None]
    scores.backward(gradient.to(scores.dtype))
    assert rows.grad is not None
    return rows.grad
