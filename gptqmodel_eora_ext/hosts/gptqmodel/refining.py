"""`EoRA(refine=…)`: the adapter of a checkpoint that was just written, trained on the calibration data of its making.

It runs on the checkpoint as it is loaded from disk, so it comes after `save`, or at the end of `generate`; the refined
adapter lies beside the first, and the checkpoint names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...refine import RefineSettings
from ..refine import refine_checkpoint, refined_beside


def joined_windows(batches: Iterable[Mapping[str, Any]], settings: RefineSettings) -> list[dict[str, list[int]]]:
    """Calibration batches as windows of one length: tokens that count, joined and cut.

    Args:
        batches: `input_ids` and, where there is padding, `attention_mask`, windows × tokens each.
        settings: tell the length of a window, and how many tokens are wanted at most.

    Raises:
        ValueError: for too few tokens.
    """
    tokens: list[int] = []
    for batch in batches:
        ids = torch.as_tensor(batch["input_ids"])
        mask = batch.get("attention_mask")
        tokens += (ids if mask is None else ids[torch.as_tensor(mask).bool().reshape(ids.shape)]).flatten().tolist()
    count = min(settings.windows, len(tokens) // settings.window)
    if count < settings.least_windows:
        raise ValueError(
            f"EoRA: `refine` needs {settings.least_windows} windows of {settings.window} tokens, of which one "
            f"validates, and the calibration data has {len(tokens)} tokens. Pass more of it (160,000 tokens are a good "
            f'number), a smaller window (refine={{"window": …}}), or refine later on other data with `eora refine`.'
        )
    return [{"input_ids": tokens[place * settings.window : (place + 1) * settings.window]} for place in range(count)]


def refine_written(
    checkpoint: Path, base: str, adapter: Path, windows: list[dict[str, list[int]]], settings: RefineSettings
) -> Path:
    """Refine an adapter that was written for a checkpoint.

    Args:
        checkpoint: its folder.
        base: the full-precision model.
        adapter: the adapter's folder.
        windows: of `joined_windows`.
        settings: of the refinement.

    Returns:
        The refined adapter's folder, beside ``adapter``.
    """
    output = refined_beside(adapter)
    asked = {**asdict(settings), "tokens": len(windows) * settings.window}
    refine_checkpoint(checkpoint, base, windows, adapter=adapter, output=output, **asked)
    return output
