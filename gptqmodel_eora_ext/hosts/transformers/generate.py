"""`eora generate BASE CHECKPOINT` for whatever transformers loads: pruned checkpoints, and other tools' formats."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ...adapter.naming import DEFAULT_FOLDER
from ...adapter.options import AdapterOptions
from ...adapter.save import save_adapter
from ...formats.factors import PACKED_LAYOUT
from ...formats.sizes import ModuleShape
from ...loop.weights import weights_fingerprint
from ...system.distributed import by_first
from ..jobs import AdapterJob, KnownWeights, LoopJob, ReadWeight
from ..registry import layer_loop
from .reader import PLAIN, LayerReader
from .weights import ForeignWeights


def generate_adapter(job: AdapterJob) -> Path:
    """Make an adapter for a checkpoint of any format that transformers loads, and return its folder.

    The full-precision model runs layer by layer, each with Ŵ + BA in place of W once it is compensated; of the
    checkpoint, too, one layer is in memory at a time. The adapter loads over the checkpoint by PEFT.

    Args:
        job: without an output, the adapter goes into the checkpoint's folder, as `eora`.

    Raises:
        ValueError: for missing data, a checkpoint of another model, one with the model's own weights, one that
            transformers cannot read here, or a folder that cannot be written to.
        NotImplementedError: for ranks of a plan, modules that were renamed or joined, norms that were changed, or
            modules that quantise their inputs by fixed scales.
        ModuleError: when compensating a module fails.
    """
    if job.ranks is not None:
        raise NotImplementedError(
            f"EoRA: ranks by a plan are for files of the plan's host; `{job.checkpoint}` is opened by transformers. "
            f"Name a rank or a budget."
        )
    job.require_whole("a checkpoint of transformers")
    AdapterOptions.settle(**job.adapter).for_making(**job.adapter)
    folder = job.output if job.output is not None else job.checkpoint / DEFAULT_FOLDER
    if job.output is None and not os.access(job.checkpoint, os.W_OK):
        raise ValueError(f"EoRA: cannot write into `{job.checkpoint}`. Name a folder for the adapter.")
    reader = LayerReader(job.checkpoint, trust_remote_code=bool(job.loading.get("trust_remote_code")))
    weights = ForeignWeights(reader, job.base)
    linear = [name for name, module in reader.model.named_modules() if isinstance(module, torch.nn.Linear)]
    weights.check_format(linear)

    def known(shapes: Sequence[ModuleShape], read: ReadWeight) -> KnownWeights:
        return weights.known(shapes, read, local_folder(job.base))

    made = layer_loop(job.base)(
        LoopJob(
            base=job.base,
            known=known,
            windows=job.windows,
            adapter=job.adapter,
            layout=PACKED_LAYOUT,
            method="other weights" if reader.method == PLAIN else reader.method,
            batch_size=job.batch_size,
            loading=job.loading,
            report=job.report,
            keeping=job.keeping,
            source=weights_fingerprint(job.checkpoint),
        )
    )
    names = [name for name, _ in reader.model.named_modules()]
    by_first(
        lambda: save_adapter(
            folder, made.factors, base_model=str(job.checkpoint), module_names=names, details=made.details
        )
    )
    if job.keeping is not None:
        job.keeping.finish()
    return folder


def local_folder(base: str) -> Path | None:
    """Folder of a model that was just loaded: its own, or that of the hub's cache; None where it is in neither."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, local_files_only=True))
    except (OSError, ValueError):
        return None
