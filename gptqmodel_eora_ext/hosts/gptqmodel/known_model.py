"""GPTQModel's layer loop over a full-precision model, for quantised weights that another host knows."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gptqmodel import GPTQModel, QuantizeConfig

from ...loop.weights import check_weight_files
from ..jobs import Compensated, LoopJob
from ..terminal import watch_layers
from .adapter import EoRA
from .generate import FINISHED
from .known_weights import CheckpointProcessor
from .modules import check_experts, layered, module_shapes
from .quantize import RUN_ATTRIBUTE, CompensatingLooper, logs_out_of_the_way
from .run import CompensationRun, batches_required, calibrated_by, rounds_to_make

# What GPTQModel wants to know of a quantisation before it loads a model. Nothing is quantised by it here, and whole
# rows as groups fit every width.
CONFIG = {"bits": 4, "group_size": -1}


def compensate_known(job: LoopJob) -> Compensated:
    """Run the model layer by layer and make factors for every module whose Ŵ is known.

    The model is computed in float32: kernels of other hosts keep more digits of Ŵ than bfloat16 has. Where GPTQModel
    leaves weights in the checkpoint's files, one layer's are in memory at a time.

    Raises:
        ValueError: for missing data, broken weights, or weights that do not fit (by ``job.known``).
        NotImplementedError: for several rounds, or experts that GPTQModel would pass over.
        ModuleError: when compensating a module fails.
    """
    adapter = EoRA(**job.adapter)
    adapter.settle_for_making()
    adapter.options = dataclasses.replace(adapter.options, layout=job.layout)
    rounds = rounds_to_make(adapter, FINISHED)
    with logs_out_of_the_way():
        config = QuantizeConfig(**CONFIG, dynamic=_dynamic(job.ranks))
        host = GPTQModel.load(job.base, config, dtype=torch.float32, **job.loading)
        check_experts(host)
        check_weight_files(Path(host.model_local_path))
        shapes = module_shapes(host)
        known = job.known(shapes, layered(host, shapes).weight)
        run = CompensationRun(adapter, config.dynamic, method=job.method, rounds=rounds)
        run.together = job.together
        setattr(host, RUN_ATTRIBUTE, run)
        run.keeping, run.source = job.keeping, job.source
        run.asked = {**adapter.to_dict(), "layout": repr(job.layout)}
        if job.report is not None:
            watch_layers(host, job.report)
        with batches_required(host):
            processor = CheckpointProcessor(known, **calibrated_by(host, job.windows, job.batch_size))
        with job.keeping or contextlib.nullcontext():
            CompensatingLooper(host, processors=[processor]).loop()
    return Compensated(run.factors, run.details())


def _dynamic(ranks: Mapping[str, int] | None) -> dict[str, Any] | None:
    """Ranks by GPTQModel's own overrides, a pattern for each module."""
    if ranks is None:
        return None
    return {f"^{re.escape(name)}$": {"adapter": {"rank": rank}} for name, rank in ranks.items()}
