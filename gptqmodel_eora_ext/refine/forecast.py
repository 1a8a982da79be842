"""What widths and ranks will buy in a module, told before it is quantised: from GPTQ done quickly, and its error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ..budget import ModuleShape
from ..ranks import (
    FIRST_OF_UNIFORM,
    RANK_STEP,
    RankAllocation,
    RankOptions,
    TokenCorrection,
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

UNCORRECTED = TokenCorrection()


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
        # Modules that share an input follow one another.
        if self._last is None or self._last[0] is not moment:
            energies = moment if self.spread or moment.ndim == 1 else moment.diagonal()
            self._last = (moment, column_order(energies.to(weight.device), self.grid.group_size))
        return self._last[1]


def forecast(name: str, delta: torch.Tensor, sensitivity: Sensitivity, rank: int) -> Forecast:
    """Predicted loss of a module without an adapter, and what each of ``rank`` components takes off.

    Args:
        name: full module name.
        delta: ΔW, out × in, float32: known, or by `Rounder`.
        sensitivity: of the model.
        rank: 0 for no components.
    """
    if name not in sensitivity.output_moments:
        # No calibration token reached it: nothing is known to be lost.
        return Forecast(0.0, torch.zeros(rank, dtype=torch.float64))
    second_moment = sensitivity.second_moments[name].to(delta.device)
    output_moment = sensitivity.output_moments[name].to(delta.device)
    solver = diagonal if second_moment.ndim == 1 else eora
    lora_A, lora_B = solver(delta, second_moment, min(max(rank, RANK_STEP), *delta.shape))
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
    return Forecast(total, gains[:rank].cpu(), correction)


def _ratio(found: float, expected: float) -> float:
    return max(found, 0.0) / expected if expected > 0 else 1.0


def forecast_allocation(
    shapes: Sequence[ModuleShape],
    budget: int,
    factor_bits: int,
    sensitivity: Sensitivity,
    error: Callable[[str], torch.Tensor],
    *,
    fixed_rank: Callable[[str], int | None] = lambda name: None,
    progress: Callable[[Sequence[ModuleShape]], Iterable[ModuleShape]] = iter,
) -> RankAllocation:
    """Forecast every module and give out the budget.

    A module that would take the largest rank on offer is forecast again with the largest that any may have.

    Args:
        shapes: of the modules, in the order in which the loop meets them.
        budget: bytes for all.
        factor_bits: of stored factors.
        sensitivity: of the model.
        error: ΔW of a module, out × in, float32: known, or by `Rounder`.
        fixed_rank: of a module that does not choose.
        progress: wraps the modules, to show how far the forecasts are.
    """
    options: dict[str, RankOptions] = {}
    curves: dict[str, Curve] = {}
    corrections: dict[str, TokenCorrection] = {}

    def offer(shape: ModuleShape, most: int) -> None:
        # What no calibration token reached gets nothing.
        fixed = fixed_rank(shape.name) if shape.name in sensitivity.output_moments else 0
        options[shape.name] = found = rank_options(shape, most, factor_bits, fixed=fixed)
        known = forecast(shape.name, error(shape.name), sensitivity, found.ranks[-1])
        curves[shape.name], corrections[shape.name] = known.curve(found), known.correction

    first = most_rank(shapes, budget, factor_bits, FIRST_OF_UNIFORM)
    for shape in progress(shapes):
        offer(shape, first)
    at = price(list(curves.values()), budget)
    for shape in shapes:
        last = len(options[shape.name].ranks) - 1
        if last > 0 and curves[shape.name].best_at(at) == last:
            offer(shape, most_rank(shapes, budget, factor_bits))
    return RankAllocation(options, curves, sensitivity.output_moments, corrections, budget)
