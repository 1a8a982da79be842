"""What `EoRA(budget=…)` and `eora plan` measure of GPTQModel's model before its layer loop starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ...adapter.options import AdapterOptions
from ...formats.sizes import ModuleShape
from ...loop.allocation import RankAllocation
from ...loop.budgeting import allocate_budget
from ...plan.survey import Bar, survey
from ...plan.sweep import Question, Rounding, Swept
from ...solve import Moment
from .grids import module_grid, spreads_errors
from .modules import layered, module_shapes


def allocate_ranks(
    model: Any,
    options: AdapterOptions,
    batches: Sequence[Mapping[str, Any]],
    fixed_rank: Callable[[str], int | None],
    quantized: Callable[[str, torch.Tensor, Moment], torch.Tensor] | None = None,
    source: str = "",
    together: Callable[[str], str | None] = lambda name: None,
) -> RankAllocation:
    """Measure sensitivities (or find them in the cache), forecast every module, and give out the budget.

    Args:
        model: GPTQModel's model object, full precision, before its loop.
        options: what was asked of the adapter, with a budget.
        batches: calibration batches as the host prepares them: `input_ids` and `attention_mask`, windows × tokens.
        fixed_rank: module's name → rank that `dynamic` names for it, None where it names none.
        quantized: module's name, W and C → Ŵ, for a finished checkpoint or pruned weights; by default Ŵ is found by a
            quick GPTQ.
        source: tells one ``quantized`` from another, so that forecasts are kept.
        together: module's name → what it shares a rank in with others of its shape; None for one that does not.

    Raises:
        ValueError: for a budget in no known form or one that buys nothing, or a model without modules to compensate.
        NotImplementedError: for a model that cannot be run layer by layer.
    """
    shapes = module_shapes(model)
    config = model.quantize_config

    def rounding(name: str) -> Rounding:
        bits = config.dynamic_get(name, "bits", config.bits)
        return Rounding((bits,), module_grid(config, name), spreads_errors(config))

    return allocate_budget(
        layered(model, shapes), shapes, batches, options, rounding, quantized=quantized, source=source,
        fixed_rank=fixed_rank, together=together, bar=_bar,
    )  # fmt: skip


def survey_model(
    model: Any,
    shapes: Sequence[ModuleShape],
    batches: Sequence[Mapping[str, Any]],
    question: Question,
    *,
    kind: str,
    bar: Bar | None = None,
) -> Swept:
    """Forecast the modules that the loop will quantise.

    Args:
        model: GPTQModel's model object, full precision, before its loop.
        shapes: its `module_shapes`.
        batches: calibration batches, as for `allocate_ranks`.
        question: what to forecast.
        kind: of sensitivity.
        bar: makes a progress bar of a title; GPTQModel's own by default.

    Raises:
        NotImplementedError: for a model that cannot be run layer by layer.
    """
    names = [shape.name for shape in shapes]
    return survey(layered(model, shapes), names, batches, question, kind=kind, with_kinds=False, bar=bar or _bar)


def _bar(title: str) -> Callable[[Sequence[Any]], Iterable[Any]]:
    """GPTQModel's own progress bar, with an estimate."""

    def wrap(items: Sequence[Any]) -> Iterable[Any]:
        from gptqmodel.utils.logger import setup_logger

        bar: Iterable[Any] = setup_logger().pb(list(items)).title(title)
        return bar

    return wrap
