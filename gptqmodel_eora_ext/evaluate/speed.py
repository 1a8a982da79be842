"""What a model costs to run on this machine: tokens per second of writing, and the most memory while it does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Tokens that are read before writing begins, and that are written, one at a time.
PROMPT_TOKENS, WRITTEN_TOKENS = 64, 32
# The first run makes layers ready and is not counted; the median of three is not moved by one that was disturbed.
WARM_UP, RUNS = 1, 3
# Written to `clear_refs`, it has Linux forget the peak so far.
FORGET_PEAK = "5"


def measure_speed(
    model: Any, prompt: torch.Tensor, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Write greedily after a prompt, a few times.

    Args:
        model: a transformers causal language model.
        prompt: 1-D token ids; the first `PROMPT_TOKENS` are read.
        progress: called with (runs done, runs in all).

    Returns:
        `tokens_per_second`: median over runs, reading the prompt included; `runs`: each, in tokens per second;
        `peak_bytes`: the device's where that is a GPU, else the process's, libraries and all that is loaded included;
        None where the system does not tell.
    """
    device = next(model.parameters()).device
    ids = prompt[:PROMPT_TOKENS].to(device, torch.int64)[None]
    forget_peak(device)
    runs = []
    for run in range(WARM_UP + RUNS):
        start = time.perf_counter()
        written = write(model, ids, WRITTEN_TOKENS, until_end=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        if run >= WARM_UP:
            runs.append(len(written) / seconds)
        if progress is not None:
            progress(run + 1, WARM_UP + RUNS)
    return {"tokens_per_second": statistics.median(runs), "runs": runs, "peak_bytes": peak_bytes(device)}


def write(model: Any, ids: torch.Tensor, tokens: int, *, until_end: bool) -> list[int]:
    """What a model writes after a prompt, always taking the likeliest token.

    Args:
        model: a transformers causal language model.
        ids: 1 × tokens, int64, on the model's device.
        tokens: to write, at most.
        until_end: whether it stops earlier where it ends its text.
    """
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            **({} if until_end else {"min_new_tokens": tokens}),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=_any_end(model),
        )
    written: list[int] = found[0, ids.shape[1] :].tolist()
    return written


def _any_end(model: Any) -> int:
    """A token to pad with: one row is never padded, but `generate` warns where none is named."""
    ends = model.generation_config.eos_token_id
    first = ends[0] if isinstance(ends, list) and ends else ends
    return first if isinstance(first, int) else 0


def forget_peak(device: torch.device) -> None:
    """Have what `peak_bytes` tells begin anew; on systems other than Linux it cannot, and tells the process's whole."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text(FORGET_PEAK)
    except OSError:
        return


def peak_bytes(device: torch.device) -> int | None:
    """The most memory since `forget_peak`, in bytes; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("VmHWM:")), None)
    return None if found is None else 1024 * int(found.split()[1])
