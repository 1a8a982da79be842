"""A budget given out before a run's first layer: what is refused, and what is measured and forecast for it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..adapter.budget import budget_bytes, largest_uniform_rank
from ..adapter.options import AdapterOptions
from ..adapter.vocabulary import FACTOR_BITS, SENSITIVITIES
from ..formats.factors import PACKED_LAYOUT
from ..formats.sizes import ModuleShape, factor_bytes
from ..plan.layered import LayeredModel
from ..plan.ranks import least_budget
from ..plan.survey import Bar, survey
from ..plan.sweep import Rounding
from ..solve import Moment
from .allocation import RankAllocation
from .forecasts import budget_question, forecast_allocation

log = logging.getLogger(__name__)


def allocate_budget(
    model: LayeredModel,
    shapes: Sequence[ModuleShape],
    batches: Sequence[Mapping[str, Any]],
    options: AdapterOptions,
    rounding: Callable[[str], Rounding],
    *,
    quantized: Callable[[str, torch.Tensor, Moment], torch.Tensor] | None = None,
    source: str = "",
    fixed_rank: Callable[[str], int | None] = lambda name: None,
    together: Callable[[str], str | None] = lambda name: None,
    bar: Bar = lambda title: iter,
) -> RankAllocation:
    """Measure sensitivities (or find them in the cache), forecast every module, and give out the budget.

    Args:
        model: at full precision, run layer by layer.
        shapes: the modules that will be quantised, in the order in which the loop meets them.
        batches: calibration: `input_ids` and `attention_mask`, windows × tokens each.
        options: what was asked of the adapter, with a budget.
        rounding: module's name → how its weights will be rounded.
        quantized: module's name, W and C → Ŵ, for a finished checkpoint or pruned weights; by default Ŵ is found by a
            quick GPTQ.
        source: tells one ``quantized`` from another, so that forecasts are kept.
        fixed_rank: module's name → its rank, if it does not choose; None if it does.
        together: module's name → what it shares a rank in with others of its shape; None for one that does not.
        bar: makes a progress bar of that title, which wraps a sequence.

    Raises:
        ValueError: for a budget in no known form, or too small for any component; for NaN or infinity in inputs or
            gradients.
        NotImplementedError: for a model that cannot be run layer by layer.
    """
    budget = budget_bytes(options.budget, shapes)
    check_budget(budget, shapes, options, fixed_rank)
    log.info("EoRA: a budget of %.1f MB for %d modules.", budget / 1e6, len(shapes))
    found = survey(
        model,
        [shape.name for shape in shapes],
        batches,
        dataclasses.replace(
            budget_question(shapes, budget, options.factor_bits, rounding, quantized, fixed_rank, options.layout),
            source=source,
        ),
        kind=options.sensitivity,
        with_kinds=True,
        bar=bar,
    )
    return forecast_allocation(
        shapes, budget, options.factor_bits, found, fixed_rank=fixed_rank, layout=options.layout, together=together
    )


def check_budget(
    budget: int, shapes: Sequence[ModuleShape], options: AdapterOptions, fixed_rank: Callable[[str], int | None]
) -> None:
    """Refuse a budget that buys no component at all, with the least that buys one.

    Args:
        budget: bytes.
        shapes: the modules that share it.
        options: what was asked of the adapter.
        fixed_rank: module's name → its rank, if it does not choose; None if it does.

    Raises:
        ValueError: naming both.
    """
    least = least_budget(shapes, options.factor_bits, fixed_rank, options.layout)
    if budget < least:
        zeros = "" if options.factor_bits != FACTOR_BITS[0] or options.layout != PACKED_LAYOUT else (
            " A 16-bit adapter holds rank 1 of zeros for a module that gets nothing; factors of 8 or 4 bits do not."
        )  # fmt: skip
        raise ValueError(
            f"EoRA: the budget {options.budget!r} is {budget} bytes, which buys nothing: the smallest adapter of these "
            f"{len(shapes)} modules takes {least} bytes.{zeros} Allow at least that."
        )


def budgeted_rank(shapes: Sequence[ModuleShape], options: AdapterOptions) -> int:
    """The largest rank that the budget allows for all modules alike.

    Args:
        shapes: the modules that share the budget.
        options: what was asked of the adapter.

    Raises:
        ValueError: for a budget in no known form, or too small for rank 1.
    """
    budget = budget_bytes(options.budget, shapes)
    rank = largest_uniform_rank(budget, shapes, options.factor_bits, options.layout)
    if rank == 0:
        least = options.layout.multiple if options.factor_bits < FACTOR_BITS[0] else 1
        one = sum(factor_bytes(least, shape, options.factor_bits, options.layout) for shape in shapes)
        differing = least_budget(shapes, options.factor_bits, layout=options.layout) <= budget
        remedy = f", or let ranks differ: sensitivity={SENSITIVITIES[0]!r}" if differing else ""
        raise ValueError(
            f"EoRA: the budget {options.budget!r} is {budget} bytes; rank {least} for all {len(shapes)} modules takes "
            f"{one}. Allow at least that{remedy}."
        )
    log.info("EoRA: a budget of %.1f MB for %d modules, rank %d for all.", budget / 1e6, len(shapes), rank)
    return rank
