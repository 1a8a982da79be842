"""Perplexity of a checkpoint, with and without its adapter, loaded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .perplexity import TextLoss, text_loss
from .size import weight_bytes


def measure_checkpoint(
    checkpoint: Path,
    adapter: Path | None,
    text: Path,
    *,
    window: int,
    max_windows: int | None = None,
    progress: Callable[[str], Callable[[int, int], None]] | None = None,
) -> list[dict[str, Any]]:
    """Return a row for the quantised model and, where there is an adapter, one for it with its adapter.

    Args:
        checkpoint: quantised checkpoint.
        adapter: adapter folder; None for a checkpoint without.
        text: held-out text, UTF-8.
        window: tokens per window.
        max_windows: stop after so many.
        progress: makes a `report(done, total)` callback for a named step.
    """
    from ..hosts.registry import loader
    from ..hosts.terminal import quiet

    with quiet():
        from transformers import AutoTokenizer

        tokens = AutoTokenizer.from_pretrained(checkpoint)(text.read_text(encoding="utf-8", errors="replace")).input_ids
        ids = torch.tensor(tokens)
        loaded = loader(checkpoint)(checkpoint, adapter)

        def measure(name: str) -> TextLoss:
            report = progress(name) if progress is not None else None
            return text_loss(loaded.model, ids, window=window, max_windows=max_windows, progress=report)

        with loaded.without_adapters():
            rows = [_row("quantised", measure("without adapter"), weight_bytes(checkpoint), 0)]
        if adapter is not None:
            rows.append(
                _row("quantised + EoRA", measure("with adapter"), weight_bytes(checkpoint), weight_bytes(adapter))
            )
    return rows


def _row(name: str, loss: TextLoss, base: int, adapter: int) -> dict[str, Any]:
    return {
        "model": name,
        "perplexity": loss.perplexity,
        "nats": loss.nats,
        "tokens": loss.tokens,
        "bytes": base + adapter,
        "adapter_bytes": adapter,
    }
