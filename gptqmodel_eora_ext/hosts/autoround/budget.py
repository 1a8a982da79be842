"""A budget in place of a rank, in AutoRound's loop: sensitivities and forecasts before the first block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from auto_round.utils import check_to_quantized, get_block_names

from ...adapter.options import AdapterOptions
from ...loop.allocation import RankAllocation
from ...loop.budgeting import Rounding, allocate_budget
from ...loop.place import is_linear, use_linear_layers
from ...solve import Grid
from ...system.memory import on_one_device
from .moments import IGNORED_TOKEN

# AutoRound tunes rounding and clipping by gradients; forecasts stand in for that by a quick GPTQ that searches scales.
SCALE_SEARCH = 2.4


def allocate_ranks(orchestrator: Any, options: AdapterOptions, token_ids: Sequence[torch.Tensor]) -> RankAllocation:
    """Measure sensitivities (or read them from the cache), forecast every module, and give out the budget.

    Args:
        orchestrator: AutoRound's object for the run, its model at full precision.
        options: with a budget.
        token_ids: calibration, 1 × tokens each.

    Raises:
        NotImplementedError: when the model is not in memory as a whole.
        ValueError: for a model without linear layers to compensate, or without calibration tokens.
    """
    model = orchestrator.model_context.model
    groups = orchestrator.quant_block_list or get_block_names(model)
    blocks = tuple(f"{name}." for group in groups for name in group)
    quantized: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(blocks) and is_linear(module) and check_to_quantized(module)
    }
    if not quantized or not token_ids:
        missing = "linear layers to compensate" if token_ids else "calibration tokens"
        raise ValueError(f"EoRA: a budget needs {missing}, and there are none. Name a rank.")
    absent = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if absent is not None:
        raise NotImplementedError(
            f"EoRA: a budget needs gradients of the whole model, but AutoRound keeps {absent} on disk. "
            f"Pass low_cpu_mem_usage=False, or name a rank."
        )

    def rounding(name: str) -> Rounding:
        linear = quantized[name]
        return Rounding(linear.bits, Grid(linear.group_size, bool(linear.sym), SCALE_SEARCH))

    put_back = use_linear_layers(model)
    try:
        linears: dict[str, Any] = {name: model.get_submodule(name) for name in quantized}
        # The first block is on the GPU by now, the rest of the model is not.
        with on_one_device(model):
            return allocate_budget(model, linears, [_batch(ids) for ids in token_ids], options, rounding)
    finally:
        put_back()


def _batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    keep = ids.reshape(1, -1) != IGNORED_TOKEN
    return {"input_ids": ids.reshape(1, -1).clamp_min(0), "attention_mask": keep.long()}
