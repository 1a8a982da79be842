"""What all modules of a kind (`q_proj`, …) lose together, measured beside a sweep (`plan.sweep` tells why)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..system.distributed import current, share
from .gradients import HEAD_TOKENS
from .layered import LayeredModel
from .ranks import kind_of


class Kinds:
    """Takes windows through the layers, once as they are and once for each kind of module with its weights replaced."""

    def __init__(self, model: LayeredModel, modules: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> None:
        self._model = model
        group = current()
        mine = range(len(batches)) if group is None else share(len(batches), group.size, group.rank)
        self._windows = model.begin(batches[mine.start : mine.stop])
        self._hidden = {
            kind: [window.hidden for window in self._windows] for kind in dict.fromkeys(map(kind_of, modules))
        }

    def state(self) -> dict[str, Any]:
        """What the next layer starts from, for `load_state`."""
        return {"windows": [window.hidden for window in self._windows], "hidden": self._hidden}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where another process stopped."""
        for window, hidden in zip(self._windows, state["windows"], strict=True):
            window.hidden = hidden
        self._hidden = {kind: list(streams) for kind, streams in state["hidden"].items()}

    @torch.no_grad()
    def step(
        self, index: int, linears: Mapping[str, torch.nn.Linear], replaced: Mapping[str, torch.Tensor]
    ) -> None:
        """Take all windows through the layer that is in memory.

        Args:
            index: of the layer.
            linears: its modules by full name.
            replaced: full module name → the weight that it gets where its kind is measured.
        """
        model = self._model
        layer = model.model.get_submodule(model.layers[index])
        for window in self._windows:
            window.hidden = model.run(layer, index, window.hidden, window)
        for kind, streams in self._hidden.items():
            with _replaced(linears, {name: one for name, one in replaced.items() if kind_of(name) == kind}):
                self._hidden[kind] = [
                    model.run(layer, index, hidden, window)
                    for hidden, window in zip(streams, self._windows, strict=True)
                ]

    @torch.no_grad()
    def divergences(self) -> dict[str, float]:
        """Kullback-Leibler divergence of each kind's scores from those of the model, mean over tokens that count."""
        # In the order of the tokens, since a sum of floats depends on it; several processes join theirs.
        parts: dict[str, list[float]] = {kind: [] for kind in self._hidden}
        tokens = 0
        with self._model.head() as head:
            for place, window in enumerate(self._windows):
                tokens += int(window.keep.sum())
                counted = {kind: streams[place][window.keep] for kind, streams in self._hidden.items()}
                plain = window.hidden[window.keep]
                for start in range(0, len(plain), HEAD_TOKENS):
                    some = slice(start, start + HEAD_TOKENS)
                    likely = head(plain[some]).float().softmax(-1)
                    # −Σ p log p of each token.
                    entropies = torch.special.entr(likely).sum(-1)
                    for kind, hidden in counted.items():
                        scores = head(hidden[some]).float()
                        # Σ p log q of each token, where q is the softmax of the scores; it is not formed.
                        crossed = torch.linalg.vecdot(likely, scores) - scores.logsumexp(-1)
                        parts[kind].append(float((entropies + crossed).sum(dtype=torch.float64)))
        if (group := current()) is not None:
            told = group.gather([tokens, parts])
            tokens = sum(one for one, _ in told)
            parts = {kind: [part for _, one in told for part in one[kind]] for kind in parts}
        return {kind: -_added(one) / max(tokens, 1) for kind, one in parts.items()}


def _added(parts: Sequence[float]) -> float:
    """The sum, one after another: `sum` compensates rounding in some versions of Python."""
    total = 0.0
    for part in parts:
        total += part
    return total


@contextmanager
def _replaced(linears: Mapping[str, torch.nn.Linear], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    originals = {name: linears[name].weight.data for name in weights}
    try:
        for name, weight in weights.items():
            linears[name].weight.data = weight
        yield
    finally:
        for name, weight in originals.items():
            linears[name].weight.data = weight
