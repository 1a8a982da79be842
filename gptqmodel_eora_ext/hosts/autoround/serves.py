"""What AutoRound serves, for the commands and the evaluation (`hosts.registry`): quantising.

Finished checkpoints, its own among them, are GPTQModel's to load and to make adapters for; plans are for GPTQ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoTokenizer

from ..registry import QuantizeJob
from . import seams
from .config import EoRAConfig

QUANTIZER = "autoround"

# Without the autoload (it may be switched off), nothing else has installed the plugin.
seams.install_or_log()


def quantizer(name: str) -> Callable[[QuantizeJob], Path] | None:
    """AutoRound's sign-SGD, in its block loop."""
    return _quantize if name == QUANTIZER else None


def _quantize(job: QuantizeJob) -> Path:
    if job.plan is not None:
        raise NotImplementedError("EoRA: plans are for GPTQ. Quantise with AutoRound under a budget or with a rank.")
    settings = dict(job.settings)
    form, bits = settings.pop("format"), settings.pop("bits")
    if job.adapter is not None:
        settings["alg_configs"] = ["signround", EoRAConfig(**job.adapter)]
    rounder = AutoRound(
        job.model,
        tokenizer=AutoTokenizer.from_pretrained(job.model, trust_remote_code=job.trust_remote_code),
        scheme=f"W{bits}A16",
        dataset=[torch.tensor([window["input_ids"]]) for window in job.windows],
        nsamples=len(job.windows),
        seqlen=len(job.windows[0]["input_ids"]),
        batch_size=job.batch_size,
        device_map=job.device,
        format=form,
        **settings,
    )
    _, folder = rounder.quantize_and_save(str(job.output), format=form)
    return Path(folder)
