"""A budget given out before the loop starts: a forecast for every module, kind by kind."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ..formats.sizes import ModuleShape
from ..plan.forecast import Forecast, ratio, with_components
from ..plan.ranks import FIRST_OF_UNIFORM, MOST_OF_UNIFORM, RANK_STEP, RankOptions, kind_of, most_rank, rank_options
from ..plan.sensitivity import Sensitivity
from ..solve import price
from ..system.side_by_side import side_by_side
from .allocation import RankAllocation

log = logging.getLogger(__name__)

# Share of a kind's loss below which what is left of it tells nothing.
LEAST_LEFT = 0.01
# Ranks that a module is offered in the loop, over the one that it is forecast to take. Of SmolLM2's 210 modules 2 to 10
# take all that they are offered, most of them an `o_proj`.
HEADROOM = 2


def forecast_allocation(
    shapes: Sequence[ModuleShape],
    budget: int,
    factor_bits: int,
    sensitivity: Sensitivity,
    weights: Mapping[str, torch.Tensor],
    quantized: Callable[[str, torch.Tensor], torch.Tensor],
    divergence: Callable[[Mapping[str, torch.Tensor]], float],
    *,
    fixed_rank: Callable[[str], int | None] = lambda name: None,
    progress: Callable[[Sequence[ModuleShape]], Iterable[ModuleShape]] = iter,
) -> RankAllocation:
    """Forecast every module, and give out the budget.

    All modules of a kind are measured together, with the factors of a uniform rank; what that is over the forecast
    scales the kind's forecasts. A module that would take the largest rank on offer is forecast again with the largest
    that any may have. In the loop, where each is solved for the largest rank on offer, it is offered up to `HEADROOM`
    times the one forecast.

    Args:
        shapes: of the modules, in the order in which the loop meets them.
        budget: bytes for all.
        factor_bits: of stored factors.
        sensitivity: of the model.
        weights: W of each module, out × in.
        quantized: Ŵ of a module from its name and W: known, or by `Rounder`.
        divergence: `kinds.Divergence` of the model.
        fixed_rank: of a module that does not choose.
        progress: wraps the modules, to show how far the forecasts are.
    """
    options: dict[str, RankOptions] = {}
    forecasts: dict[str, Forecast] = {}
    scales: dict[str, float] = {}
    uniform = most_rank(shapes, budget, factor_bits, 1)

    def offer(shape: ModuleShape, most: int, approximation: torch.Tensor) -> torch.Tensor:
        """Forecast, and return Ŵ + BA of the uniform rank."""
        # What no calibration token reached gets nothing.
        fixed = fixed_rank(shape.name) if shape.name in sensitivity.output_moments else 0
        options[shape.name] = found = rank_options(shape, most, factor_bits, fixed=fixed)
        delta = weights[shape.name].to(torch.float32) - approximation
        known, lora_A, lora_B = with_components(shape.name, delta, sensitivity, found.ranks[-1])
        forecasts[shape.name] = known
        return torch.addmm(approximation, lora_B[:, :uniform].float(), lora_A[:uniform].float())

    first, last = (most_rank(shapes, budget, factor_bits, times) for times in (FIRST_OF_UNIFORM, MOST_OF_UNIFORM))
    # Kind by kind, so that other weights of only one are in memory.
    kinds = list(dict.fromkeys(kind_of(shape.name) for shape in shapes))
    by_kind = sorted(shapes, key=lambda shape: kinds.index(kind_of(shape.name)))

    def compensate(shape: ModuleShape) -> torch.Tensor:
        weight = weights[shape.name]
        return offer(shape, first, quantized(shape.name, weight).to(torch.float32)).to(weight.dtype)

    shown = iter(progress(by_kind))
    for kind, members in itertools.groupby(by_kind, key=lambda shape: kind_of(shape.name)):
        compensated: dict[str, torch.Tensor] = {}
        for weight in side_by_side(compensate, members, weights[by_kind[0].name].device):
            compensated[next(shown).name] = weight
        total = sum(forecasts[name].total for name in compensated)
        left = sum(forecasts[name].left(uniform) for name in compensated)
        scales[kind] = 1.0
        if left > LEAST_LEFT * total:
            measured = divergence(compensated)
            if math.isfinite(measured):
                scales[kind] = ratio(measured, left)
            else:
                log.warning("EoRA: with all %s quantised the model gives NaN or infinity; their forecasts stay as "
                            "they are.", kind)  # fmt: skip
    forecasts = {name: known.scaled(scales[kind_of(name)]) for name, known in forecasts.items()}
    curves = {shape.name: forecasts[shape.name].curve(options[shape.name]) for shape in shapes}
    at = price(list(curves.values()), budget)
    for shape in shapes:
        name = shape.name
        if 0 < len(options[name].ranks) - 1 == curves[name].best_at(at):
            offer(shape, last, quantized(name, weights[name]).to(torch.float32))
            forecasts[name] = forecasts[name].scaled(scales[kind_of(name)])
            curves[name] = forecasts[name].curve(options[name])
        ranks = options[name].ranks
        largest = HEADROOM * ranks[curves[name].best_at(at)] + RANK_STEP
        count = max(sum(rank <= largest for rank in ranks), 1)
        options[name], curves[name] = options[name].first(count), curves[name].first(count)
    corrections = {name: known.correction for name, known in forecasts.items()}
    in_order = {shape.name: options[shape.name] for shape in shapes}
    return RankAllocation(in_order, curves, sensitivity.output_moments, corrections, budget)
