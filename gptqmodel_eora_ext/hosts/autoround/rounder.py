"""AutoRound's object for windows of token ids, as our commands make it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.utils import get_block_names
from transformers import AutoTokenizer

from ..jobs import Report, Windows


def rounder_of(
    model: str, windows: Windows, *, batch_size: int, trust_remote_code: bool, device: str | None, **settings: Any
) -> Any:
    """AutoRound's object, before any work.

    Args:
        model: a folder or a hub name.
        windows: calibration, as in `QuantizeJob`; all as long as the first.
        batch_size: windows a step.
        trust_remote_code: whether model code from the hub may run.
        device: "cpu", "cuda" or "cuda:0"; None leaves it to AutoRound.
        settings: AutoRound's own.
    """
    return AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code),
        dataset=[torch.tensor([window["input_ids"]]) for window in windows],
        nsamples=len(windows),
        seqlen=len(windows[0]["input_ids"]),
        batch_size=batch_size,
        device_map=device,
        **settings,
    )


def watch_blocks(rounder: Any, report: Report) -> None:
    """Have ``report`` called with (blocks done, blocks in all) after each block."""
    rounder.post_init()
    compress = rounder.alg_composer.compress_block
    groups = rounder.quant_block_list or get_block_names(rounder.model_context.model)
    names = [name for group in groups for name in group]

    @functools.wraps(compress)
    def watched(block: Any, fp_inputs: Any, input_others: Any, block_ctx: Any, **kwargs: Any) -> Any:
        found = compress(block, fp_inputs, input_others, block_ctx, **kwargs)
        # By its place, since an interrupted run's blocks are not made again.
        report(names.index(block_ctx.block_name) + 1, len(names))
        return found

    # An attribute of the instance hides the method, for this run alone.
    rounder.alg_composer.compress_block = watched
