"""A conversation with an ensemble: turn by turn, with the cache of earlier turns where its weights still serve."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from .ensemble import CACHES, MOST_CHANGE, Ensemble, change


@dataclass(frozen=True)
class Turn:
    """An answer.

    Attributes:
        text: what the model wrote.
        weights: member → weight, of those that have any.
        rerouted: whether the weights are others than those of the turn before, for which its cache was given up.
        wanted: member → weight that the router would have chosen now; as ``weights`` unless the cache was kept.
    """

    text: str
    weights: dict[str, float]
    rerouted: bool
    wanted: dict[str, float]


class Conversation:
    """Turns of one conversation.

    Every turn is routed anew by all of the conversation so far. Where the weights would change by less than
    `MOST_CHANGE`, the cache is kept and its weights with it; otherwise it is dropped, and all turns are computed with
    the new weights.

    Args:
        model: transformers' model, with an ensemble.
        tokenizer: the model's own; with a chat template, or turns are joined by line ends.
        ensemble: the model's.
        max_new_tokens: of an answer.
    """

    def __init__(self, model: Any, tokenizer: Any, ensemble: Ensemble, *, max_new_tokens: int = 200) -> None:
        self._model, self._tokenizer, self._ensemble = model, tokenizer, ensemble
        self._most = max_new_tokens
        self._messages: list[dict[str, str]] = []
        self._cache: Any = None
        self._cached = torch.zeros(0, dtype=torch.int64)
        known = inspect.signature(model.forward).parameters
        self._cache_name = next((name for name in CACHES if name in known), CACHES[-1])

    def say(self, text: str) -> Turn:
        """Take a turn and answer it.

        Args:
            text: what the user says.
        """
        self._messages.append({"role": "user", "content": text})
        ids = self._ids()
        wanted = self._ensemble.route(ids).weights[0]
        before = None if self._cache is None else self._ensemble.weights_of(self._cache)
        # A template may write earlier turns in another way than they were generated.
        begins = len(self._cached) < ids.shape[1] and torch.equal(ids[0, : len(self._cached)].cpu(), self._cached)
        keep = before is not None and begins and change(before[0], wanted) < MOST_CHANGE
        options: dict[str, Any] = {self._cache_name: self._cache} if keep else {}
        # Without a cache, the prompt is routed as any other is, so that whatever watches the ensemble sees it.
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=self._most, do_sample=False,
                return_dict_in_generate=True, pad_token_id=self._tokenizer.eos_token_id, **options,
            )  # fmt: skip
        self._cache = next(one for name in CACHES if (one := getattr(made, name, None)) is not None)
        # The last token was written and never read, so that the cache ends before it.
        self._cached = made.sequences[0, : int(self._cache.get_seq_length())].cpu()
        answer = self._tokenizer.decode(made.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": answer})
        used = self._ensemble.weights_of(self._cache)
        assert used is not None, "the cache of an answer that was just computed has weights"
        weights = self._named(used[0])
        return Turn(answer, weights, before is not None and not keep, self._named(wanted) if keep else weights)

    def _ids(self) -> torch.Tensor:
        if getattr(self._tokenizer, "chat_template", None):
            text = self._tokenizer.apply_chat_template(self._messages, tokenize=False, add_generation_prompt=True)
        else:
            text = "\n".join(one["content"] for one in self._messages) + "\n"
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor([ids], device=self._model.device)

    def _named(self, weights: torch.Tensor) -> dict[str, float]:
        return {name: float(one) for name, one in zip(self._ensemble.members, weights, strict=True) if one > 0}
