"""Sensitivities of a model on some of the calibration data, measured once and kept in the user's cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..system.files import cache_folder
from .sensitivity import Sensitivity, fingerprint, measure_sensitivity

log = logging.getLogger(__name__)

# Tokens of the calibration data that sensitivities stand on: some 25 s for SmolLM2 on two cores. More: not tried.
SENSITIVITY_TOKENS = 4096
# Those of them that gradients are taken of, which cost twice as much: what errors fit themselves to is C.
GRADIENT_TOKENS = 2048
# Tokens that each kind of modules is measured on, others than those where there are more.
KIND_TOKENS = 512
# Tokens of a forward and backward pass; a longer window goes alone. The vocabulary's scores are what takes memory.
PASS_TOKENS = 1024


def cached_sensitivity(
    model: torch.nn.Module,
    linears: Mapping[str, torch.nn.Linear],
    batches: Sequence[Mapping[str, Any]],
    *,
    kind: str,
    progress: Callable[[Sequence[Mapping[str, Any]]], Iterable[Mapping[str, Any]]] = iter,
) -> Sensitivity:
    """Sensitivities from the cache of the user, or measured and put there."""
    some = first_tokens(batches, SENSITIVITY_TOKENS)
    named = fingerprint(model, linears, some, kind, gradient_tokens=GRADIENT_TOKENS)
    path = cache_folder() / "sensitivity" / f"{named}.safetensors"
    if path.is_file():
        log.info("EoRA: sensitivities from `%s`.", path)
        return Sensitivity.load(path)
    found = measure_sensitivity(model, linears, some, kind=kind, gradient_tokens=GRADIENT_TOKENS, progress=progress)
    found.save(path)
    return found


def unseen_tokens(batches: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """`KIND_TOKENS` that sensitivities do not stand on; of little data the last, of a long window the first of it."""
    taken = first_tokens(batches, SENSITIVITY_TOKENS + KIND_TOKENS)
    found: list[Mapping[str, Any]] = []
    left = KIND_TOKENS
    for batch in reversed(taken):
        if left <= 0:
            break
        rows, width = batch["input_ids"].shape
        few = min(rows, -(-left // width))
        found.append({name: one[rows - few :, :KIND_TOKENS] for name, one in batch.items()})
        left -= few * width
    return found[::-1]


def first_tokens(batches: Sequence[Mapping[str, Any]], tokens: int) -> list[Mapping[str, Any]]:
    """As many windows as have so many tokens, in passes of `PASS_TOKENS`."""
    taken: list[Mapping[str, Any]] = []
    for batch in batches:
        ids = torch.atleast_2d(torch.as_tensor(batch["input_ids"]))
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask).reshape(ids.shape)
        rows = max(1, PASS_TOKENS // ids.shape[1])
        for few_ids, few_mask in zip(ids.split(rows), mask.split(rows), strict=True):
            if tokens <= 0:
                return taken
            taken.append({"input_ids": few_ids, "attention_mask": few_mask})
            tokens -= few_ids.numel()
    return taken
