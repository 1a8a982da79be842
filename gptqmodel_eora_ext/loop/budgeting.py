"""What a run under a budget knows before its first layer: sensitivities, forecasts, and the budget by them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..adapter.budget import budget_bytes, largest_uniform_rank
from ..adapter.options import AdapterOptions
from ..adapter.vocabulary import FACTOR_BITS, SENSITIVITIES
from ..formats.sizes import ModuleShape, factor_bytes
from ..plan.divergence import Divergence
from ..plan.forecast import Rounder
from ..plan.ranks import least_budget
from ..plan.survey import cached_sensitivity, unseen_tokens
from ..solve import Grid
from .allocation import RankAllocation
from .forecasts import forecast_allocation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rounding:
    """How a host will round one module's weights.

    Attributes:
        bits: of a code.
        grid: groups, symmetry, and the search for scales.
        spreads: whether rounding errors are spread over later columns, as GPTQ does.
    """

    bits: int
    grid: Grid
    spreads: bool = True


def allocate_budget(
    model: torch.nn.Module,
    linears: Mapping[str, torch.nn.Linear],
    batches: Sequence[Mapping[str, Any]],
    options: AdapterOptions,
    rounding: Callable[[str], Rounding],
    *,
    quantized: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    fixed_rank: Callable[[str], int | None] = lambda name: None,
    bar: Callable[[str], Callable[[Sequence[Any]], Iterable[Any]]] = lambda title: iter,
) -> RankAllocation:
    """Measure sensitivities (or read them from the cache), forecast every module, and give out the budget.

    Args:
        model: the whole model, at full precision.
        linears: what will be quantised, by full name, in the order in which the loop meets it.
        batches: calibration: `input_ids` and `attention_mask`, windows × tokens each.
        options: with a budget.
        rounding: of a module.
        quantized: Ŵ of a module from its name and W, where it is known; by default it is found by a quick GPTQ.
        fixed_rank: of a module that does not choose.
        bar: makes a progress bar of that title, which wraps a sequence.

    Raises:
        ValueError: for a budget in no known form, or too small for any component.
    """
    shapes = [ModuleShape(name, one.out_features, one.in_features) for name, one in linears.items()]
    budget = budget_bytes(options.budget, shapes)
    check_budget(budget, shapes, options, fixed_rank)
    sensitivity = cached_sensitivity(
        model, linears, batches, kind=options.sensitivity, progress=bar("EoRA: measuring sensitivities")
    )
    log.info("EoRA: a budget of %.1f MB for %d modules.", budget / 1e6, len(shapes))
    rounders: dict[Grid, Rounder] = {}

    def quickly(name: str, weight: torch.Tensor) -> torch.Tensor:
        how = rounding(name)
        rounder = rounders.setdefault(how.grid, Rounder(sensitivity, how.grid, spread=how.spreads))
        [approximation] = rounder(name, weight, [how.bits])
        return approximation

    return forecast_allocation(
        shapes,
        budget,
        options.factor_bits,
        sensitivity,
        {name: linear.weight.detach() for name, linear in linears.items()},
        quantized or quickly,
        Divergence(model, linears, unseen_tokens(batches)),
        fixed_rank=fixed_rank,
        progress=bar("EoRA: forecasting modules"),
    )


def check_budget(
    budget: int, shapes: Sequence[ModuleShape], options: AdapterOptions, fixed_rank: Callable[[str], int | None]
) -> None:
    """Refuse a budget that buys no component at all, with the least that buys one.

    Args:
        budget: bytes.
        shapes: the modules that share it.
        options: what was asked.
        fixed_rank: of a module that does not choose.

    Raises:
        ValueError: naming both.
    """
    least = least_budget(shapes, options.factor_bits, fixed_rank)
    if budget < least:
        zeros = "" if options.factor_bits != FACTOR_BITS[0] else (
            " A 16-bit adapter holds rank 1 of zeros for a module that gets nothing; factors of 8 or 4 bits do not."
        )  # fmt: skip
        raise ValueError(
            f"EoRA: the budget {options.budget!r} is {budget} bytes, which buys nothing: the smallest adapter of these "
            f"{len(shapes)} modules takes {least} bytes.{zeros} Allow at least that."
        )


def budgeted_rank(shapes: Sequence[ModuleShape], options: AdapterOptions) -> int:
    """The largest rank for all modules that the budget allows.

    Raises:
        ValueError: for a budget in no known form, or too small for rank 1.
    """
    budget = budget_bytes(options.budget, shapes)
    rank = largest_uniform_rank(budget, shapes, options.factor_bits)
    if rank == 0:
        one = sum(factor_bytes(1, shape, options.factor_bits) for shape in shapes)
        differing = least_budget(shapes, options.factor_bits) <= budget
        raise ValueError(
            f"EoRA: the budget {options.budget!r} is {budget} bytes; rank 1 for all {len(shapes)} modules takes {one}. "
            f"Allow at least that{', or let ranks differ: sensitivity=' + repr(SENSITIVITIES[0]) if differing else ''}."
        )
    log.info("EoRA: a budget of %.1f MB for %d modules, rank %d for all.", budget / 1e6, len(shapes), rank)
    return rank
