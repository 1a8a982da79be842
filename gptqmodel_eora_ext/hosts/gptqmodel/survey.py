"""What `EoRA(budget=…)` and `eora plan` have to know of GPTQModel's model before its layer loop starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ...adapter.options import AdapterOptions
from ...formats.sizes import ModuleShape
from ...loop.allocation import RankAllocation
from ...loop.budgeting import Rounding, allocate_budget
from ...plan.sensitivity import Sensitivity
from ...plan.survey import cached_sensitivity
from .grids import module_grid, spreads_errors
from .modules import full_precision, module_shapes


def allocate_ranks(
    model: Any,
    options: AdapterOptions,
    batches: Sequence[Mapping[str, Any]],
    fixed_rank: Callable[[str], int | None],
    quantized: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> RankAllocation:
    """Measure sensitivities (or read them from the cache), forecast every module, and give out the budget.

    Args:
        model: GPTQModel's model object, full precision, before its loop.
        options: with a budget.
        batches: prepared calibration batches.
        fixed_rank: rank that `dynamic` names for a module, None where it names none.
        quantized: Ŵ of a module from its name and W, for a finished checkpoint; by default from a quick GPTQ.

    Raises:
        ValueError: for a budget in no known form, or a model without modules to compensate.
        NotImplementedError: for a module that is no linear layer in transformers' own model.
    """
    dense, linears = full_precision(model, module_shapes(model))
    config = model.quantize_config

    def rounding(name: str) -> Rounding:
        bits = config.dynamic_get(name, "bits", config.bits)
        return Rounding(bits, module_grid(config, name), spreads_errors(config))

    return allocate_budget(
        dense, linears, batches, options, rounding, quantized=quantized, fixed_rank=fixed_rank, bar=_bar
    )


def survey(
    model: Any, shapes: Sequence[ModuleShape], batches: Sequence[Mapping[str, Any]], *, kind: str
) -> tuple[dict[str, torch.nn.Linear], Sensitivity]:
    """What the loop will quantise at full precision, and its sensitivities.

    Args:
        model: GPTQModel's model object, full precision, before its loop.
        shapes: its `module_shapes`.
        batches: prepared calibration batches.
        kind: of sensitivity.

    Raises:
        NotImplementedError: for a module that is no linear layer in transformers' own model.
    """
    dense, linears = full_precision(model, shapes)
    progress = _bar("EoRA: measuring sensitivities")
    return linears, cached_sensitivity(dense, linears, batches, kind=kind, progress=progress)


def _bar(title: str) -> Callable[[Sequence[Any]], Iterable[Any]]:
    """GPTQModel's own progress bar, with an estimate."""

    def wrap(items: Sequence[Any]) -> Iterable[Any]:
        from gptqmodel.utils.logger import setup_logger

        bar: Iterable[Any] = setup_logger().pb(list(items)).title(title)
        return bar

    return wrap
