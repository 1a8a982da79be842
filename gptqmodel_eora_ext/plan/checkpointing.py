"""Layers that keep their inputs alone and are run again for the backward; and whether a model needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

# Bytes that a layer keeps for its backward, over those of the inputs and outputs of its linear modules.
KEPT = 2


def activation_bytes_of(
    model: torch.nn.Module, modules: Iterable[torch.nn.Linear], batches: Sequence[Mapping[str, Any]]
) -> int:
    """About what a forward keeps for its backward."""
    tokens = max((torch.as_tensor(batch["input_ids"]).numel() for batch in batches), default=0)
    width = next(model.parameters()).element_size()
    return KEPT * width * tokens * sum(one.in_features + one.out_features for one in modules)


@contextmanager
def checkpointing(
    model: torch.nn.Module,
    modules: Iterable[torch.nn.Module],
    recomputing: Callable[[], AbstractContextManager[None]],
) -> Iterator[None]:
    """Have the layers that hold ``modules`` keep no activations; transformers' own switch works in training alone."""

    def wrapped(layer: torch.nn.Module) -> Callable[..., Any]:
        plain = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            return checkpoint(
                plain, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputing()), **kwargs
            )

        return forward

    layers = _layers(model, modules)
    # A library that dispatches layers may have put its own there.
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = wrapped(layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _layers(model: torch.nn.Module, modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """The outermost members of module lists that hold any of ``modules``."""
    wanted, covered = set(modules), set[torch.nn.Module]()
    layers = []
    for parent in model.modules():
        if isinstance(parent, torch.nn.ModuleList) and parent not in covered:
            for layer in parent:
                inside = set(layer.modules())
                covered |= inside
                if wanted & inside:
                    layers.append(layer)
    return layers
