"""Perplexity of a checkpoint, with and without its adapter, loaded once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
    """Return a row for the model and, where there is an adapter, one for it with its adapter.

    Args:
        checkpoint: a quantised checkpoint, or a model at full precision.
        adapter: adapter folder; None for a checkpoint without.
        text: file of held-out text, as `calibration.read_texts` takes it.
        window: tokens per window.
        max_windows: stop after so many.
        trust_remote_code: whether code that comes with the model or its tokenizer may run.
        progress: makes a `report(done, total)` callback for a named step.

    Raises:
        ValueError: for an adapter beside a model that is not quantised, or a text that cannot be read.
    """
    quantised = is_quantised(checkpoint)
    if adapter is not None and not quantised:
        raise ValueError(
            f"`{checkpoint}` is not quantised, and an adapter corrects the checkpoint that it was made for. Name that "
            f"checkpoint, or leave the adapter out."
        )
    from ..hosts.registry import loader
    from ..hosts.terminal import quiet

    def measure(name: str) -> TextLoss:
        report = progress(name) if progress is not None else None
        return text_loss(model, ids, window=window, max_windows=max_windows, progress=report)

    with quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        ids = text_tokens(text, tokenizer, window=window, max_windows=max_windows)
        size = weight_bytes(checkpoint)
        if not quantised:
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint, dtype="auto", trust_remote_code=trust_remote_code
            ).to("cuda" if torch.cuda.is_available() else "cpu")
            return [_row("full precision", measure("full precision"), size, 0)]
        loaded = loader(checkpoint)(checkpoint, adapter, trust_remote_code=trust_remote_code)
        model = loaded.model
        with loaded.without_adapters():
            rows = [_row("quantised", measure("without adapter"), size, 0)]
        if adapter is not None:
            rows.append(_row("quantised + EoRA", measure("with adapter"), size, weight_bytes(adapter)))
    return rows


def is_quantised(checkpoint: Path) -> bool:
    """Whether a model's folder says how it was quantised, in either place where that is written."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("quantization_config")) or (checkpoint / "quantize_config.json").is_file()


def _row(name: str, loss: TextLoss, base: int, adapter: int) -> dict[str, Any]:
    return {
        "model": name,
        "perplexity": loss.perplexity,
        "nats": loss.nats,
        "tokens": loss.tokens,
        "bytes": base + adapter,
        "adapter_bytes": adapter,
    }
