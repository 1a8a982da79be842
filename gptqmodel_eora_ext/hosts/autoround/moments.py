"""Second moments of a block's module inputs, from one forward of AutoRound's own runner over its own cached inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from auto_round.compressors.utils import block_forward

from ...capture import SecondMoment

# AutoRound's calibrator gives this id to tokens that count for nothing: padding, and repetitions at a sample's end.
IGNORED_TOKEN = -100


def second_moments(
    block: torch.nn.Module,
    modules: Mapping[str, torch.nn.Module],
    runner: Any,
    inputs: Any,
    input_others: Mapping[str, Any],
    token_ids: Sequence[torch.Tensor] | None,
) -> dict[str, SecondMoment]:
    """Run the block and sum x xᵀ of each module's input; modules that read one tensor share one sum.

    Args:
        block: as it is now, quantised.
        modules: linear layers of the block by full name.
        runner: AutoRound's `BlockForwardRunner`; its batching, device and autocast are used, not its compiled forward.
        inputs: hidden states, a list of samples (or a dict of them), as the runner takes them.
        input_others: the block's other arguments.
        token_ids: of each sample, 1 × tokens; `IGNORED_TOKEN` is left out of the sums. None: every token counts.

    Returns:
        ``{full name: moment}``; a module that no token reached has none.
    """
    eager = copy.copy(runner)
    eager.block_forward = block_forward
    watch = _Watch(modules)
    samples = inputs["hidden_states"] if isinstance(inputs, dict) else inputs
    count = len(samples)
    with torch.no_grad(), watch:
        for start in range(0, count, eager.batch_size):
            batch = range(start, min(start + eager.batch_size, count))
            watch.begin_batch(_keep_mask(token_ids, batch))
            eager.forward(block, inputs, dict(input_others), torch.tensor(batch))
    return watch.moments()


def _keep_mask(token_ids: Sequence[torch.Tensor] | None, batch: Sequence[int]) -> torch.Tensor | None:
    if token_ids is None or len(token_ids) <= batch[-1]:
        return None
    chosen = [token_ids[index].reshape(1, -1) for index in batch]
    if len({ids.shape for ids in chosen}) > 1:
        return None
    return torch.cat(chosen) != IGNORED_TOKEN


class _Watch:
    """Hooks on the modules of a block."""

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self._modules = modules
        self._sums: dict[str, SecondMoment] = {}
        self._leaders: dict[str, str] = {}
        self._handles = ExitStack()
        self._keep: torch.Tensor | None = None
        # Inputs of the batch under way, kept so that no other tensor takes their identity.
        self._seen: dict[int, tuple[torch.Tensor, str]] = {}

    def __enter__(self) -> None:
        for name, module in self._modules.items():
            self._handles.callback(module.register_forward_pre_hook(self._hook(name)).remove)

    def __exit__(self, *exception: object) -> None:
        self._handles.close()
        self._seen = {}

    def begin_batch(self, keep: torch.Tensor | None) -> None:
        """Rows of the next forward to count, batch × tokens; None for all."""
        self._keep = keep
        self._seen = {}

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0]
            first = self._seen.setdefault(id(rows), (rows, name))[1]
            leader = self._leaders.setdefault(name, first)
            if leader != name:
                if first != leader:
                    raise RuntimeError(
                        f"{name} read the input of {leader} in one batch and another input in a later one; such a "
                        f"block cannot be compensated in AutoRound's loop. Use `eora generate` on its checkpoint."
                    )
                return
            keep = self._keep if self._keep is not None and self._keep.shape == rows.shape[:-1] else None
            moment = self._sums.get(name)
            if moment is None:
                moment = self._sums[name] = SecondMoment(rows.shape[-1], name)
            # The block runs under autocast, which would take the products to 16 bits.
            with torch.autocast(rows.device.type, enabled=False):
                moment.add(rows, keep)

        return hook

    def moments(self) -> dict[str, SecondMoment]:
        return {name: self._sums[leader] for name, leader in self._leaders.items()}
