"""Refining the adapter of a finished checkpoint, whichever host loads it: what `eora refine` and Python call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapter.errors import AdapterError
from ..adapter.folder import AdapterFolder
from ..adapter.naming import DEFAULT_FOLDER
from ..adapter.summary import find_adapter
from ..calibration import read_texts, tokenized
from ..refine import Outcome, RefineJob, RefineSettings, refine_adapter
from .registry import base_folder, file_refiner, trainee

log = logging.getLogger(__name__)

# What a refined adapter's folder is called after the one that it began with; inside a checkpoint, after the default.
REFINED = "-refined"
DEFAULT_REFINED = DEFAULT_FOLDER + REFINED


def refined_beside(adapter: Path) -> Path:
    """The folder for what becomes of an adapter, where the user names none; a file, for one in a file."""
    if adapter.is_file():
        return adapter.with_name(f"{adapter.stem}{REFINED}{adapter.suffix}")
    return adapter.with_name(adapter.name + REFINED)


def refined_output(checkpoint: Path, adapter: str | Path | None, output: str | Path | None) -> Path:
    """Where the refined adapter is written; see `refine_checkpoint`."""
    if output is not None:
        return Path(output)
    return refined_beside(_adapter_file(checkpoint, adapter)) if checkpoint.is_file() else checkpoint / DEFAULT_REFINED


def refine_checkpoint(
    checkpoint: str | Path,
    base: str,
    calibration: str | Iterable[Any],
    *,
    adapter: str | Path | None = None,
    output: str | Path | None = None,
    loss: str | None = None,
    tokens: int | str | None = None,
    window: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    passes: int | None = None,
    device: str | None = None,
    restart: bool = False,
    trust_remote_code: bool = False,
    teaching: Callable[[int, int], None] = lambda done, total: None,
    training: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Outcome:
    """Train the factors of a checkpoint's adapter together, by what the whole model loses, and write a new adapter.

    Ŵ, norms and everything else stay as they are, so that the checkpoint serves the old adapter and the new one. The
    sizes stay, too: ranks, and the bits of the factors, to which they are rounded while they are trained.

    In memory are the packed weights, three times the factors in float32, one layer's activations and its Ŵ, and the
    scores of some tokens; before that, one layer of the full-precision model at a time. Its last layer's outputs are
    kept in a file beside ``output`` until the run is complete: tokens × width in 16 bits.

    Args:
        checkpoint: folder of the quantised model, or its GGUF file.
        base: the full-precision model that it was quantised from, a folder or a hub name; an F16, BF16 or F32 GGUF file
            of it, where the checkpoint is one.
        calibration: a file or data set, as `eora quantize --calibration` takes it; documents; or windows of token ids,
            as `calibration.windows` cuts them.
        adapter: folder of the adapter to begin with; None for the one that the checkpoint names. A GGUF file names
            none, and has its adapter in a file.
        output: folder for the refined one; None for `eora-refined` inside the checkpoint, which then names it. For a
            GGUF file a file; None for one beside the adapter.
        loss: "kl" (divergence of the scores from the full-precision model's), "rilq", or "natural" (one
            natural-gradient step by that divergence, in place of training); None for "kl".
        tokens: of calibration, as 160000 or "160k", a fifth of which validates; None for 160,000, or 16,384 for
            "natural".
        window: tokens in a window; None for 512.
        learning_rate: of the first step; None for 1e-3. "natural" takes none.
        seed: of the order of the windows; None for 0.
        passes: how many times each window that trains is used; None for 1. Each takes as long as the first.
        device: "cpu", "cuda" or "cuda:0"; None leaves it to the host.
        restart: whether what an interrupted run has left is removed.
        trust_remote_code: whether model code from the hub may run.
        teaching: hears how far the full-precision model is: (layers done, layers in all).
        training: hears of every step: (steps done, steps in all, its loss in words).

    Returns:
        What the run has come to: validation losses before and after, steps, and what ended it.

    Raises:
        AdapterError: where there is no adapter, or one that does not fit.
        ValueError: for a setting out of range, or a base or calibration that does not fit the checkpoint.
        NotImplementedError: for a checkpoint that no host loads, or a model that cannot be run layer by layer.

    Example:
        >>> outcome = refine_checkpoint("out", "Qwen/Qwen3-8B", "c4.jsonl", tokens="160k")
        >>> outcome.after <= outcome.before
        True
    """
    checkpoint = Path(checkpoint)
    settings = RefineSettings.settle(
        loss=loss, tokens=tokens, window=window, learning_rate=learning_rate, seed=seed, passes=passes
    )  # fmt: skip
    if checkpoint.is_file():
        refine, found = file_refiner(checkpoint), _adapter_file(checkpoint, adapter)
        base = base_folder(base)
        ids = _ids(calibration, base, settings, trust_remote_code)
        job = RefineJob(base, ids, settings, trust_remote_code, teaching, training, restart)
        return refine(checkpoint, found, refined_output(checkpoint, found, output), job, device)
    folder = Path(adapter) if adapter is not None else find_adapter(checkpoint)
    assert folder is not None
    source = AdapterFolder.open(folder)
    target = refined_output(checkpoint, adapter, output)
    ids = _ids(calibration, base, settings, trust_remote_code)
    opened = trainee(checkpoint)(checkpoint, trust_remote_code=trust_remote_code, device=device)
    job = RefineJob(base, ids, settings, trust_remote_code, teaching, training, restart)
    return refine_adapter(opened, checkpoint, source, target, job)


def _adapter_file(checkpoint: Path, adapter: str | Path | None) -> Path:
    """The file of the adapter to begin with.

    Raises:
        AdapterError: where none is named, or there is no such file.
    """
    if adapter is not None and Path(adapter).is_file():
        return Path(adapter)
    what = "names no adapter by itself" if adapter is None else f"needs one in a file, and `{adapter}` is none"
    raise AdapterError(f"`{checkpoint}` {what}. Make one with `eora generate`, and name its file.")


def _ids(
    calibration: str | Iterable[Any], base: str, settings: RefineSettings, trust_remote_code: bool
) -> torch.Tensor:
    """Windows × tokens of calibration.

    Raises:
        ValueError: for too little of it, or windows of another length.
    """
    documents = read_texts(calibration) if isinstance(calibration, str) else calibration
    if isinstance(documents, Sequence) and documents and isinstance(documents[0], dict):
        cut: list[dict[str, list[int]]] = list(documents)[: settings.windows]
    else:
        cut = tokenized(documents, base, settings.windows, settings.window, trust_remote_code)
    for number, one in enumerate(cut):
        if len(one["input_ids"]) != settings.window or not all(one.get("attention_mask", [1])):
            raise ValueError(
                f"EoRA: window {number} of the calibration has {len(one['input_ids'])} tokens, padding included; "
                f"expected {settings.window} without padding. Cut it so, or pass window={len(one['input_ids'])}."
            )
    least = settings.least_windows
    if len(cut) < least:
        raise ValueError(
            f"EoRA: the calibration fills {len(cut)} windows of {settings.window} tokens; refinement needs {least}, of "
            f"which one validates. Pass more text, or a smaller window."
        )
    if len(cut) < settings.windows:
        log.warning("EoRA: the calibration has %d tokens where %d were asked for.",
                    len(cut) * settings.window, settings.tokens)  # fmt: skip
    return torch.tensor([one["input_ids"] for one in cut])
