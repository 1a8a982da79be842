"""What the modules of a kind lose together, measured: the full-precision model with only their weights replaced.

Forecasts stand on some thousand tokens, to which the quantiser and the factors fit themselves. What they lose on others
is more, and more so the wider the input: 1.1 times the forecast for SmolLM2's `k_proj`, 2.4 times for its `down_proj`.
Errors that all keys of a window share cancel in the softmax, and others add up, which second orders do not see either.
A forward of some hundred tokens tells it for a kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .sensitivity import model_inputs


class Divergence:
    """How far a causal language model with some weights replaced is from itself, in nats a token.

    Args:
        model: takes `input_ids` and `attention_mask`, gives `logits`.
        modules: linear layers by name.
        batches: `input_ids` (and `attention_mask`), windows × tokens each; each is one forward. The scores of all of
            them are kept.
    """

    def __init__(
        self, model: torch.nn.Module, modules: Mapping[str, torch.nn.Linear], batches: Sequence[Mapping[str, Any]]
    ) -> None:
        self._model = model
        self._modules = modules
        self._inputs = [model_inputs(model, batch) for batch in batches]
        self._likely = [self._scores(one).softmax(-1) for one in self._inputs]
        # Σ p log p, of each token.
        self._known = [-torch.special.entr(one).sum(-1) for one in self._likely]

    def __call__(self, replaced: Mapping[str, torch.Tensor]) -> float:
        """Kullback-Leibler divergence from the model as it was to the one with these weights, mean over tokens.

        Args:
            replaced: weights, out × in, by module, in the model's dtype; what was there is put back.
        """
        originals = {name: self._modules[name].weight.data for name in replaced}
        try:
            for name, weight in replaced.items():
                self._modules[name].weight.data = weight
            divergences = [
                known - _likelihood(likely, self._scores(one))
                for one, likely, known in zip(self._inputs, self._likely, self._known, strict=True)
            ]
        finally:
            for name, weight in originals.items():
                self._modules[name].weight.data = weight
        return float(torch.cat(divergences).mean())

    @torch.no_grad()
    def _scores(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Scores of the tokens that count, tokens × labels, float32."""
        logits: torch.Tensor = self._model(**inputs, use_cache=False).logits
        return logits[inputs["attention_mask"].bool()].float()


def _likelihood(likely: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Σ p log q of each token, q the softmax of ``scores``, which is not formed."""
    return torch.linalg.vecdot(likely, scores) - scores.logsumexp(-1)
