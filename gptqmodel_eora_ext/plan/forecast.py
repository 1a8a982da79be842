"""What widths and ranks will buy in a module, told before it is quantised: from GPTQ done quickly, and its error."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
    rank_curve,
)
from .ranks import RANK_STEP, RankOptions, TokenCorrection
from .sensitivity import Sensitivity

log = logging.getLogger(__name__)
UNCORRECTED = TokenCorrection()
# Share by which the weighted error of a forecast's components may exceed the least; the loop solves its own.
TOLERANCE = 0.01


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
    return with_components(name, delta, sensitivity, rank)[0]


def with_components(
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
        correction = TokenCorrection(ratio(whole - left, first), ratio(left, total - first))
    gains, total = correction(gains, total)
    return Forecast(total, gains[:rank].cpu(), correction), lora_A[:rank], lora_B[:, :rank]


def ratio(found: float, expected: float) -> float:
    return max(found, 0.0) / expected if expected > 0 else 1.0
