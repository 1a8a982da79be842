"""A budget in place of a rank, in AutoRound's loop: sensitivities and forecasts before the first block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ...adapter.layers import shape_of
from ...adapter.options import AdapterOptions
from ...loop.allocation import RankAllocation
from ...loop.budgeting import allocate_budget
from ...plan.layered import LayeredModel
from ...plan.sweep import Rounding
from ...solve import Grid
from .disk import DiskWeights, shell
from .modules import quantized_linears
from .moments import IGNORED_TOKEN

# AutoRound tunes rounding and clipping by gradients, which takes too long for a forecast. Forecasts round by a quick
# GPTQ that searches for scales in place of it.
SCALE_SEARCH = 2.4


def allocate_ranks(orchestrator: Any, options: AdapterOptions, token_ids: Sequence[torch.Tensor]) -> RankAllocation:
    """Measure sensitivities (or find them in the cache), forecast every module, and give out the budget.

    Args:
        orchestrator: AutoRound's object for the run, its model at full precision, in memory or on disk.
        options: what was asked of the adapter, with a budget.
        token_ids: calibration samples, 1 × tokens each; `IGNORED_TOKEN` does not count.

    Raises:
        NotImplementedError: for a model that cannot be run layer by layer.
        ValueError: for a budget that buys nothing, a model without linear layers to compensate, or no calibration
            tokens.
    """
    quantized = quantized_linears(orchestrator)
    if not quantized or not token_ids:
        missing = (
            "linear layers to compensate, and there are none"
            if token_ids
            else "calibration tokens, and AutoRound hands on none (of models that also see it does not)"
        )
        raise ValueError(f"EoRA: a budget needs {missing}. Name a rank.")

    def rounding(name: str) -> Rounding:
        linear = quantized[name]
        return Rounding((linear.bits,), Grid(linear.group_size, bool(linear.sym), SCALE_SEARCH))

    shapes = [shape_of(name, one) for name, one in quantized.items()]
    batches = [_batch(ids) for ids in token_ids]
    model = orchestrator.model_context.model
    return allocate_budget(layered(model, list(quantized)), shapes, batches, options, rounding)


def layered(model: torch.nn.Module, names: Sequence[str]) -> LayeredModel:
    """The model as AutoRound holds it; where weights are on disk, a model that reads them layer by layer from there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # AutoRound leaves empty tensors, or some on the meta device, in the place of what is on disk.
    absent = [name for name, one in model.named_parameters() if one.is_meta or not one.numel()]
    if not absent:
        return LayeredModel(model, None, names, device)
    named = str(getattr(model, "name_or_path", ""))
    try:
        folder = Path(named) if Path(named).is_dir() else Path(snapshot_download(named, local_files_only=True))
    except (OSError, ValueError) as error:
        raise NotImplementedError(
            f"EoRA: AutoRound keeps {absent[0]} on disk, and neither a folder nor the hub's cache holds `{named}`, "
            f"which the model names as its source. Pass low_cpu_mem_usage=False, or name a rank."
        ) from error
    # Model code beside the weights has run already, if there is any: AutoRound holds an instance of it.
    remote = type(model).__module__.startswith("transformers_modules")
    return LayeredModel(shell(folder, trust_remote_code=remote), DiskWeights(folder), names, device)


def _batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A calibration sample as `input_ids` and `attention_mask`, 1 × tokens each."""
    keep = ids.reshape(1, -1) != IGNORED_TOKEN
    return {"input_ids": ids.reshape(1, -1).clamp_min(0), "attention_mask": keep.long()}
