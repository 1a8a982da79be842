"""What GPTQModel serves, for the commands and the evaluation (`hosts.registry`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gptqmodel import GPTQModel, QuantizeConfig

from ...plan import without_groups
from ...plan.layered import LayeredModel
from ...plan.survey import Bar
from ...plan.sweep import Question, Swept
from ...refine import Trainee
from ...solve import METHODS
from ...system.distributed import refuse_shared
from ..jobs import (
    AdapterJob,
    Compensated,
    FullPrecision,
    Loaded,
    Loader,
    LoopJob,
    PruneJob,
    QuantizeJob,
    Windows,
)
from ..terminal import watch_layers
from . import seams
from .adapter import EoRA
from .checkpoint.load import with_adapter
from .generate import generate_adapter
from .known_model import CONFIG, compensate_known
from .modules import check_experts, layered, module_shapes
from .planned import check_plan
from .prune import prune_model
from .quantize import logs_out_of_the_way
from .survey import survey_model
from .trainable import open_trainee

QUANTIZER = "gptq"

# Without the autoload (it may be switched off), nothing else has installed the plugin.
seams.install_or_log()


def quantizer(name: str) -> Callable[[QuantizeJob], Path] | None:
    """GPTQ, in GPTQModel's layer loop."""
    return _quantize if name == QUANTIZER else None


def pruner(method: str) -> Callable[[PruneJob], Path] | None:
    """SparseGPT, Wanda and magnitude, in GPTQModel's layer loop."""
    return prune_model if method in METHODS else None


def adapter_maker(checkpoint: Path) -> Callable[[AdapterJob], Path] | None:
    """Checkpoints in GPTQ's and AWQ's formats, AutoRound's among them; others are refused by name. No single files."""
    return None if checkpoint.is_file() else _make_adapter


def full_precision(base: str) -> Callable[[str, bool], FullPrecision] | None:
    """Whatever full-precision model GPTQModel knows."""
    return lambda model, trust: _Planned(model, CONFIG, trust, dtype=torch.float32)


def layer_loop(base: str) -> Callable[[LoopJob], Compensated] | None:
    """Whatever full-precision model GPTQModel knows."""
    return compensate_known


def loader(checkpoint: Path) -> Loader | None:
    """Whatever GPTQModel loads."""
    return _load


def trainee(checkpoint: Path) -> Callable[..., Trainee] | None:
    """Whatever GPTQModel loads."""
    return open_trainee


def planner(name: str) -> Callable[[str, Mapping[str, Any], bool], FullPrecision] | None:
    """Plans for GPTQ."""
    return _Planned if name == QUANTIZER else None


def _quantize(job: QuantizeJob) -> Path:
    host = GPTQModel.load(job.model, _config(job.settings), trust_remote_code=job.trust_remote_code)
    if job.report is not None:
        watch_layers(host, job.report)
    adapter = EoRA(**job.adapter) if job.adapter is not None else None
    if job.plan is not None:
        check_plan(host, job.plan)
        # A plan may find plain weights of mixed widths the best.
        adapter = EoRA(plan=job.plan) if job.plan.largest_rank else None
    if adapter is None:
        refuse_shared("quantising without an adapter", "Start it without torchrun")
    with logs_out_of_the_way():
        # Without an adapter it is all GPTQModel's own, which keeps nothing where `dynamic` names widths.
        keeping = job.keeping if adapter is not None else None
        host.quantize(list(job.windows), batch_size=job.batch_size, adapter=adapter, checkpoint=keeping)
    host.save(str(job.output))
    return job.output


def _config(settings: Mapping[str, Any]) -> QuantizeConfig:
    return QuantizeConfig(**{**without_groups(settings["group_size"]), **settings})


def _make_adapter(job: AdapterJob) -> Path:
    if job.ranks is not None:
        raise NotImplementedError(
            f"EoRA: ranks by a plan are for files of the plan's host; `{job.checkpoint}` is a checkpoint of GPTQModel, "
            f"whose plans `eora quantize --plan` runs."
        )
    return generate_adapter(
        EoRA(path=job.output, **job.adapter),
        job.base,
        job.checkpoint,
        job.windows,
        batch_size=job.batch_size,
        report=job.report,
        loading=job.loading,
        keeping=job.keeping,
        over=job.over,
        without_layers=job.without_layers,
    )


def _load(
    checkpoint: Path,
    adapter: Path | None = None,
    *,
    for_adapters: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    given = {"device": device} if device is not None else {}
    asked = EoRA() if for_adapters else EoRA(path=adapter) if adapter is not None else None
    model = GPTQModel.load(
        str(checkpoint),
        adapter=asked,
        trust_remote_code=trust_remote_code,
        **given,
    ).model
    return Loaded(model, partial(with_adapter, model))


class _Planned:
    def __init__(self, model: str, settings: Mapping[str, Any], trust_remote_code: bool, **loading: Any) -> None:
        self._host = GPTQModel.load(model, _config(settings), trust_remote_code=trust_remote_code, **loading)
        check_experts(self._host)
        self.shapes = module_shapes(self._host)

    def layered(self) -> LayeredModel:
        return layered(self._host, self.shapes)

    def survey(self, windows: Windows, question: Question, kind: str, bar: Bar) -> Swept:
        return survey_model(self._host, self.shapes, windows, question, kind=kind, bar=bar)
