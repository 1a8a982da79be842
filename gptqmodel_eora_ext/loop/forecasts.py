"""A budget given out by forecasts of every module, scaled kind by kind, before the loop starts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ..formats.factors import PACKED_LAYOUT, FactorLayout
from ..formats.sizes import ModuleShape
from ..plan.forecast import Forecast, ratio
from ..plan.ranks import MOST_OF_UNIFORM, RankOptions, joint_curve, kind_of, most_rank, rank_options
from ..plan.sweep import Question, Rounding, Swept
from ..solve import Moment, price
from .allocation import RankAllocation

log = logging.getLogger(__name__)

# If the adapter leaves less than this share of a kind's predicted loss, then what is measured of the kind is mostly
# rounding, and its forecasts are not scaled by it.
LEAST_LEFT = 0.01
# In the loop a module is offered ranks up to so many times the one that it is forecast to take. Of SmolLM2's 210
# modules 2 to 10 take the largest that they are offered, most of them an `o_proj`.
HEADROOM = 2
# A module that tokens are routed past (an expert) is offered one component for so many tokens that reached it. Factors
# of more components would fit themselves to the few tokens; forecasts, made on the same tokens, would not show that.
TOKENS_A_COMPONENT = 4


def budget_question(
    shapes: Sequence[ModuleShape],
    budget: int,
    factor_bits: int,
    rounding: Callable[[str], Rounding],
    quantized: Callable[[str, torch.Tensor, Moment], torch.Tensor] | None = None,
    fixed_rank: Callable[[str], int | None] = lambda name: None,
    layout: FactorLayout = PACKED_LAYOUT,
) -> Question:
    """What a budget asks of a sweep through the model.

    Args:
        shapes: the modules that share the budget.
        budget: bytes for all of them.
        factor_bits: bits of a stored factor.
        rounding: module's name → how its weights will be rounded, at one width.
        quantized: module's name, W and C → Ŵ, for a finished checkpoint or pruned weights; by default Ŵ is found by a
            quick GPTQ.
        fixed_rank: module's name → its rank, if it does not choose; None if it does.
        layout: of the factors.
    """
    most = most_rank(shapes, budget, factor_bits, MOST_OF_UNIFORM, layout)
    by_name = {shape.name: shape for shape in shapes}

    def rank(name: str, bits: int) -> int:
        return rank_options(by_name[name], most, factor_bits, fixed_rank(name), layout).ranks[-1]

    return Question(rounding, rank, quantized, most_rank(shapes, budget, factor_bits, 1, layout))


def forecast_allocation(
    shapes: Sequence[ModuleShape],
    budget: int,
    factor_bits: int,
    found: Swept,
    *,
    fixed_rank: Callable[[str], int | None] = lambda name: None,
    layout: FactorLayout = PACKED_LAYOUT,
    together: Callable[[str], str | None] = lambda name: None,
) -> RankAllocation:
    """Give out the budget by what a sweep found.

    The sweep has measured what all modules of a kind lose together, with factors of a uniform rank. The forecasts of
    the kind are scaled by the ratio of that to the loss forecast for the same rank. In the loop each module is solved
    for the largest rank on offer; so that this takes no longer than it needs to, the offer ends at `HEADROOM` times the
    rank that the module is forecast to take.

    Args:
        shapes: the modules that share the budget, in the order in which the loop meets them.
        budget: bytes for all of them.
        factor_bits: bits of a stored factor.
        found: the answer to `budget_question`.
        fixed_rank: module's name → its rank, if it does not choose; None if it does.
        layout: of the factors.
        together: module's name → what it shares a rank in with others of its shape; None for one that does not.
    """
    uniform = most_rank(shapes, budget, factor_bits, 1, layout)
    most = most_rank(shapes, budget, factor_bits, MOST_OF_UNIFORM, layout)
    known = {shape.name: next(iter(found.forecasts[shape.name].values())) for shape in shapes}
    scales = _scales(known, found.divergences, uniform)
    forecasts = {name: one.scaled(scales[kind_of(name)]) for name, one in known.items()}
    options: dict[str, RankOptions] = {}
    for shape in shapes:
        # A module that no calibration token reached gets no adapter.
        fixed = fixed_rank(shape.name) if shape.name in found.output_moments else 0
        reached = found.reached.get(shape.name, found.tokens)
        allowed = most if reached >= found.tokens else min(most, reached // TOKENS_A_COMPONENT)
        options[shape.name] = rank_options(shape, allowed, factor_bits, fixed, layout)
    curves = {shape.name: forecasts[shape.name].curve(options[shape.name]) for shape in shapes}
    groups: dict[str, list[str]] = {}
    for name in options:
        groups.setdefault(together(name) or name, []).append(name)
    joint = {
        one: joint_curve([options[name] for name in names], [curves[name] for name in names])
        for one, names in groups.items()
    }
    at = price([curve for _, curve in joint.values()], budget)
    for one, (shared, curve) in joint.items():
        largest = HEADROOM * shared.ranks[curve.best_at(at)] + layout.step
        for name in groups[one]:
            count = max(sum(rank <= largest for rank in options[name].ranks), 1)
            options[name], curves[name] = options[name].first(count), curves[name].first(count)
    corrections = {name: one.correction for name, one in forecasts.items()}
    sharing = {name: shared_in for name in options if (shared_in := together(name)) is not None}
    return RankAllocation(options, curves, found.output_moments, corrections, budget, sharing)


def _scales(known: Mapping[str, Forecast], divergences: Mapping[str, float], uniform: int) -> dict[str, float]:
    """The ratio of measured to forecast loss of each kind of module, both with factors of the rank ``uniform``."""
    scales: dict[str, float] = {}
    for kind in dict.fromkeys(map(kind_of, known)):
        members = [one for name, one in known.items() if kind_of(name) == kind]
        total = sum(one.total for one in members)
        left = sum(one.left(uniform) for one in members)
        measured = divergences.get(kind, math.nan)
        scales[kind] = 1.0
        if left <= LEAST_LEFT * total:
            continue
        # A true divergence is positive. One that is smaller than the rounding of the scores may come out as 0 or less.
        if math.isfinite(measured) and measured > 0:
            scales[kind] = ratio(measured, left)
        else:
            log.warning("EoRA: with all %s quantised the model's scores diverge by %g nats a token, which is no "
                        "measurement; their forecasts stay as they are.", kind, measured)  # fmt: skip
    return scales
