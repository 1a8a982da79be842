"""Perplexity of a checkpoint, with and without its adapter, loaded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .perplexity import TextLoss, text_loss, text_tokens
from .size import weight_bytes


def measure_checkpoint(
    checkpoint: Path,
    adapter: Path | None,
    text: Path,
    *,
    window: int,
    max_windows: int | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], Callable[[int, int], None]] | None = None,
) -> list[dict[str, Any]]:
    """Return a row for the quantised model and, where there is an adapter, one for it with its adapter.

    Args:
        checkpoint: quantised checkpoint.
        adapter: adapter folder; None for a checkpoint without.
        text: file of held-out text, as `calibration.read_texts` takes it.
        window: tokens per window.
        max_windows: stop after so many.
        trust_remote_code: whether code in the checkpoint's folder may run, the model's and the tokenizer's.
        progress: makes a `report(done, total)` callback for a named step.
    """
    from ..hosts.registry import loader
    from ..hosts.terminal import quiet

    with quiet():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        ids = text_tokens(text, tokenizer, window=window, max_windows=max_windows)
        loaded = loader(checkpoint)(checkpoint, adapter, trust_remote_code=trust_remote_code)

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
