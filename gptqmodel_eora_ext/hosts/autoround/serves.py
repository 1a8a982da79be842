"""What AutoRound serves, for the commands and the evaluation (`hosts.registry`): quantising.

Finished checkpoints, its own among them, are GPTQModel's to load and to make adapters for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.utils import get_block_names
from transformers import AutoTokenizer

from ...adapter.options import AdapterOptions
from ...adapter.vocabulary import AUTO
from ..jobs import QuantizeJob, Report
from . import seams
from .config import EoRAConfig

QUANTIZER = "autoround"

# Without the autoload (it may be switched off), nothing else has installed the plugin.
seams.install_or_log()


def quantizer(name: str) -> Callable[[QuantizeJob], Path] | None:
    """AutoRound's sign-SGD, in its block loop."""
    return _quantize if name == QUANTIZER else None


def _quantize(job: QuantizeJob) -> Path:
    settings = dict(job.settings)
    form, bits = settings.pop("format"), settings.pop("bits")
    settings |= {"scheme": f"W{bits}A16"} if job.plan is None else job.plan.autoround_config()
    config = _adapter_config(job)
    if config is not None:
        settings["alg_configs"] = ["signround", config]
    rounder: Any = AutoRound(
        job.model,
        tokenizer=AutoTokenizer.from_pretrained(job.model, trust_remote_code=job.trust_remote_code),
        dataset=[torch.tensor([window["input_ids"]]) for window in job.windows],
        nsamples=len(job.windows),
        seqlen=len(job.windows[0]["input_ids"]),
        batch_size=job.batch_size,
        device_map=job.device,
        format=form,
        **settings,
    )
    # As `quantize_and_save` does, which would make a folder named by model and width below this one.
    rounder.output_dir = rounder.compress_context.output_dir = str(job.output)
    if job.report is not None:
        _watch_blocks(rounder, job.report)
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


def _watch_blocks(rounder: Any, report: Report) -> None:
    """Have ``report`` called with (blocks done, blocks in all) after each block."""
    rounder.post_init()
    compress = rounder.alg_composer.compress_block
    groups = rounder.quant_block_list or get_block_names(rounder.model_context.model)
    total, done = sum(map(len, groups)), 0

    @functools.wraps(compress)
    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        found = compress(*args, **kwargs)
        done += 1
        report(done, total)
        return found

    # An attribute of the instance hides the method, for this run alone.
    rounder.alg_composer.compress_block = watched
