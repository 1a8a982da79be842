"""What an ensemble is worth: its loss on each domain beside none, the shared adapter alone, and other adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..hosts.ensemble import Ensemble, ensemble_of
from ..hosts.jobs import Loaded
from .perplexity import DEFAULT_WINDOW, Windows, predictions, summed_nats

NONE, SHARED_ALONE, ROUTED, TOLD = "none", "shared alone", "routed", "told"
# Tokens at the beginning of a window that play the prompt: weights are chosen by them, and the loss is of the others.
PROMPT = 64


@dataclass(frozen=True)
class EnsembleLosses:
    """Nats per token.

    Attributes:
        losses: contender → domain → loss.
        routed_to: domain → class → share of its windows whose prompt is nearest to that.
        fallen_back: domain → share of windows that the shared adapter served alone.
        windows: domain → how many.
    """

    losses: Mapping[str, Mapping[str, float]]
    routed_to: Mapping[str, Mapping[str, float]]
    fallen_back: Mapping[str, float]
    windows: Mapping[str, int]


def ensemble_losses(
    loaded: Loaded,
    texts: Mapping[str, torch.Tensor],
    *,
    controls: Mapping[str, Path] = {},
    window: int = DEFAULT_WINDOW,
    prompt: int = PROMPT,
    max_windows: int | None = None,
    progress: Callable[[str], Callable[[int, int], None] | None] = lambda title: None,
) -> EnsembleLosses:
    """Measure.

    Args:
        loaded: a checkpoint with its ensemble. texts: domain → token ids, 1-D. Told weights are 1 for the member of
        the domain's name, none where there is none. controls: name → folder of an adapter to compare with. window:
        tokens per window. prompt: of which so many are the prompt. max_windows: of each domain at most. progress:
        makes a `report(done, total)` of a title.

    Raises:
        AdapterError: for a model without an ensemble, or a control of another checkpoint.
        ValueError: for a text shorter than a window, or a prompt that fills it.
    """
    if not 1 <= prompt < window:
        raise ValueError(f"the prompt has {prompt} tokens; expected 1 to {window - 1}, of a window of {window}.")
    ensemble = ensemble_of(loaded.model)
    cut = {name: list(windows_of(ids, window, max_windows)) for name, ids in texts.items()}
    contenders: dict[str, Callable[[str, torch.Tensor], AbstractContextManager[Any]]] = {
        NONE: lambda domain, ids: nullcontext(),
        SHARED_ALONE: lambda domain, ids: ensemble.told({}),
        ROUTED: lambda domain, ids: ensemble.told(_routed(loaded, ensemble, ids[:prompt])),
        TOLD: lambda domain, ids: ensemble.told({domain: 1.0} if domain in ensemble.members else {}),
        **dict.fromkeys(controls, lambda domain, ids: nullcontext()),
    }  # fmt: skip
    losses: dict[str, dict[str, float]] = {}
    for contender, weighed in contenders.items():
        adapter = loaded.with_adapter(controls.get(contender)) if contender in (NONE, *controls) else nullcontext()
        report = progress(contender)
        done, total = 0, sum(map(len, cut.values()))
        with adapter:
            losses[contender] = {}
            for domain, some in cut.items():
                nats = tokens = 0.0
                for ids in some:
                    with weighed(domain, ids):
                        nats += continuation_nats(loaded.model, ids, prompt)
                    tokens += len(ids) - prompt
                    done += 1
                    if report is not None:
                        report(done, total)
                losses[contender][domain] = nats / tokens
    routed_to, fallen_back = {}, {}
    for domain, some in cut.items():
        routings = [ensemble.route(_row(loaded, ids[:prompt])) for ids in some]
        nearest = [one.nearest[0] or "too short" for one in routings]
        routed_to[domain] = {name: nearest.count(name) / len(nearest) for name in dict.fromkeys(nearest)}
        fallen_back[domain] = sum(one.fallen_back[0] for one in routings) / len(routings)
    return EnsembleLosses(losses, routed_to, fallen_back, {name: len(some) for name, some in cut.items()})


def continuation_nats(model: Any, ids: torch.Tensor, prompt: int) -> float:
    """−Σ log p of the tokens that follow a prompt, in nats.

    Args:
        model: a transformers causal language model.
        ids: one window, 1-D.
        prompt: how many of its tokens are the prompt.
    """
    logits, targets = next(predictions(model, ids, Windows(len(ids))))
    return summed_nats(logits[prompt - 1 :], targets[prompt - 1 :])


def windows_of(ids: torch.Tensor, size: int, most: int | None = None) -> Iterator[torch.Tensor]:
    """A text's windows of so many tokens, without overlap."""
    for start in Windows(size, most=most).starts(len(ids)):
        yield ids[start : start + size]


def _row(loaded: Loaded, ids: torch.Tensor) -> torch.Tensor:
    return ids[None].to(loaded.model.device, torch.int64)


def _routed(loaded: Loaded, ensemble: Ensemble, prompt: torch.Tensor) -> dict[str, float]:
    """The weights that a prompt gets, to be told for all of its window."""
    weights = ensemble.route(_row(loaded, prompt)).weights[0].tolist()
    return dict(zip(ensemble.members, weights, strict=True))
