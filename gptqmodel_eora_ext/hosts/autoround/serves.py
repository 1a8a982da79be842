"""What AutoRound serves, for the commands and the evaluation (`hosts.registry`): quantising, and plans for it.

Finished checkpoints, its own among them, are GPTQModel's to load and to make adapters for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...adapter.options import AdapterOptions
from ...adapter.vocabulary import AUTO
from ...system.distributed import refuse_shared
from ..jobs import FullPrecision, QuantizeJob
from . import seams
from .checks import TUNING
from .config import EoRAConfig
from .planner import PlannedByTuning
from .rounder import rounder_of, watch_blocks

QUANTIZER = "autoround"

# Without the autoload (it may be switched off), nothing else has installed the plugin.
seams.install_or_log()


def quantizer(name: str) -> Callable[[QuantizeJob], Path] | None:
    """AutoRound's sign-SGD, in its block loop."""
    return _quantize if name == QUANTIZER else None


def planner(name: str) -> Callable[[str, Mapping[str, Any], bool], FullPrecision] | None:
    """Plans for AutoRound."""
    if name != QUANTIZER:
        return None
    refuse_shared(*TUNING)
    return PlannedByTuning


def _quantize(job: QuantizeJob) -> Path:
    refuse_shared(*TUNING)
    settings = dict(job.settings)
    form, bits = settings.pop("format"), settings.pop("bits")
    settings |= {"scheme": f"W{bits}A16"} if job.plan is None else job.plan.autoround_config()
    config = _adapter_config(job)
    if config is not None:
        config.keeping = job.keeping
        settings["alg_configs"] = ["signround", config]
    rounder = rounder_of(
        job.model,
        job.windows,
        batch_size=job.batch_size,
        trust_remote_code=job.trust_remote_code,
        device=job.device,
        format=form,
        **settings,
    )
    # As `quantize_and_save` does, which would make a folder named by model and width below this one.
    rounder.output_dir = rounder.compress_context.output_dir = str(job.output)
    if job.report is not None:
        watch_blocks(rounder, job.report)
    rounder.quantize()
    rounder.save_quantized(str(job.output))
    return job.output


def _adapter_config(job: QuantizeJob) -> EoRAConfig | None:
    if job.plan is not None:
        # A plan may find plain weights of mixed widths the best.
        return EoRAConfig(plan=job.plan) if job.plan.largest_rank else None
    if job.adapter is None:
        return None
    options = AdapterOptions.settle(**job.adapter).for_making(**job.adapter)
    if options.rounds > 1:
        raise NotImplementedError(
            f"EoRA: AutoRound tunes each block once, and {options.rounds} rounds are asked"
            f"{f' by the preset {options.preset}' if not options.asked_rounds else ''}. Leave them out, or quantise by "
            f"GPTQ."
        )
    return EoRAConfig(
        rank=None if options.rank == AUTO else options.rank,  # type: ignore[arg-type]
        budget=options.budget,
        sensitivity=options.sensitivity,
        objective=options.objective,
        factor_bits=options.factor_bits,
    )
