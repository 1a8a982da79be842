"""What widths and ranks will buy in a module, told before it is quantised: from GPTQ done quickly, and its error."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..budget import ModuleShape
from ..ranks import (
    FIRST_OF_UNIFORM,
    MOST_OF_UNIFORM,
    RANK_STEP,
    RankAllocation,
    RankOptions,
    TokenCorrection,
    kind_of,
    most_rank,
    rank_options,
)
from ..solve import (
    ColumnOrder,
    Curve,
    Grid,
    column_order,
    component_gains,
    diagonal,
    eora,
    error_loss,
    error_losses,
    gptq,
    price,
    rank_curve,
)
from .sensitivity import Sensitivity
from .side_by_side import side_by_side

log = logging.getLogger(__name__)

UNCORRECTED = TokenCorrection()
# Share by which the weighted error of a forecast's components may exceed the least; the loop solves its own.
TOLERANCE = 0.01
# Share of a kind's loss below which what is left of it tells nothing.
LEAST_LEFT = 0.01
# Ranks that a module is offered in the loop, over the one that it is forecast to take. Of SmolLM2's 210 modules 2 to 10
# take all that they are offered, most of them an `o_proj`.
HEADROOM = 2


@dataclass(frozen=True)
class Forecast:
    """A module at some width of its weights.

    Attributes:
        total: predicted loss without an adapter.
        gains: what each component takes off, in the order in which `eora` gives them, float64. Any set of them adds up.
        correction: that both hold already.
    """

    total: float
    gains: torch.Tensor
    correction: TokenCorrection = UNCORRECTED

    def curve(self, options: RankOptions) -> Curve:
        """Loss against bytes for the ranks on offer, the components that gain most kept first."""
        ordered = self.gains.sort(descending=True).values
        return rank_curve(ordered, self.total, options.ranks, options.nbytes)

    def left(self, rank: int) -> float:
        """Loss with the first ``rank`` components."""
        return self.total - float(self.gains[:rank].sum())

    def scaled(self, factor: float) -> Forecast:
        """All losses times ``factor``."""
        return Forecast(self.total * factor, self.gains * factor, self.correction.scaled(factor))


class Rounder:
    """Ŵ as the host's quantiser will find it, by `solve.gptq` on the full-precision model's inputs.

    Args:
        sensitivity: of the model. Where only diagonals are known, weights are rounded to nearest.
        grid: how weights are rounded.
        spread: whether the quantiser spreads errors over later columns, as GPTQ does.
    """

    def __init__(self, sensitivity: Sensitivity, grid: Grid, *, spread: bool = True) -> None:
        self.sensitivity = sensitivity
        self.grid = grid
        self.spread = spread
        self._last: tuple[torch.Tensor, ColumnOrder] | None = None

    def __call__(self, name: str, weight: torch.Tensor, bits: Sequence[int]) -> list[torch.Tensor]:
        """Ŵ at each of some widths, float32.

        Args:
            name: full module name.
            weight: W, out × in.
            bits: widths.
        """
        return gptq(weight, self._columns(name, weight), bits, self.grid)

    def _columns(self, name: str, weight: torch.Tensor) -> ColumnOrder:
        moment = self.sensitivity.second_moments.get(name)
        if moment is None:
            # No token reached it; every channel counts the same.
            return column_order(torch.ones(weight.shape[1], device=weight.device), self.grid.group_size)
        # In a plan modules that share an input follow one another. Others may ask at the same time.
        last = self._last
        if last is None or last[0] is not moment:
            energies = moment if self.spread or moment.ndim == 1 else moment.diagonal()
            self._last = last = (moment, column_order(energies.to(weight.device), self.grid.group_size))
        return last[1]


def forecast(name: str, delta: torch.Tensor, sensitivity: Sensitivity, rank: int) -> Forecast:
    """Predicted loss of a module without an adapter, and what each of ``rank`` components takes off.

    Args:
        name: full module name.
        delta: ΔW, out × in, float32: known, or by `Rounder`.
        sensitivity: of the model.
        rank: 0 for no components.
    """
    return _with_components(name, delta, sensitivity, rank)[0]


def _with_components(
    name: str, delta: torch.Tensor, sensitivity: Sensitivity, rank: int
) -> tuple[Forecast, torch.Tensor, torch.Tensor]:
    """`forecast`, and A and B."""
    if name not in sensitivity.output_moments:
        # No calibration token reached it: nothing is known to be lost.
        nothing = Forecast(0.0, torch.zeros(rank, dtype=torch.float64))
        return nothing, delta.new_zeros(0, delta.shape[1]), delta.new_zeros(delta.shape[0], 0)
    second_moment = sensitivity.second_moments[name].to(delta.device)
    output_moment = sensitivity.output_moments[name].to(delta.device)
    solver = diagonal if second_moment.ndim == 1 else eora
    most = min(max(rank, RANK_STEP), *delta.shape)
    lora_A, lora_B = solver(delta, second_moment, most, tolerance=TOLERANCE)
    gains = component_gains(lora_A, lora_B, second_moment, output_moment)
    weighted = sensitivity.weighted_moments.get(name)
    if weighted is None:
        total, correction = error_loss(delta, second_moment, output_moment), UNCORRECTED
    else:
        total, whole, left = error_losses(
            delta, second_moment, weighted.to(delta.device), output_moment, lora_A[:RANK_STEP], lora_B[:, :RANK_STEP]
        )
        first = float(gains[:RANK_STEP].sum())
        correction = TokenCorrection(_ratio(whole - left, first), _ratio(left, total - first))
    gains, total = correction(gains, total)
    return Forecast(total, gains[:rank].cpu(), correction), lora_A[:rank], lora_B[:, :rank]


def _ratio(found: float, expected: float) -> float:
    return max(found, 0.0) / expected if expected > 0 else 1.0


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
        known, lora_A, lora_B = _with_components(shape.name, delta, sensitivity, found.ranks[-1])
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
                scales[kind] = _ratio(measured, left)
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
