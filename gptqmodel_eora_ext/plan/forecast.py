"""What widths and ranks will buy in a module, told before it is quantised: from the error that it will have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..solve import (
    Curve,
    Moment,
    RowMoment,
    component_gains,
    eora,
    eora_from_outputs,
    error_loss,
    error_losses,
    output_error,
    output_gains,
    output_loss,
    rank_curve,
)
from .ranks import RANK_STEP, RankOptions, TokenCorrection

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


@dataclass(frozen=True)
class ModuleMoments:
    """What a module's forecast stands on. Each moment is features × features, or the rows that it is of.

    Attributes:
        inputs: C of the full-precision model's inputs.
        output: G: of the loss's gradient at the output, or a diagonal that compares modules.
        weighted: E[‖g‖² x xᵀ] / E‖g‖²; None where there are no gradients.
    """

    inputs: Moment
    output: Moment
    weighted: Moment | None = None


def forecast(delta: torch.Tensor, known: ModuleMoments, rank: int) -> Forecast:
    """Predicted loss of a module without an adapter, and what each of ``rank`` components takes off.

    Args:
        delta: ΔW, out × in, float32: known, or by a quick GPTQ.
        known: of the module.
        rank: 0 for no components.
    """
    return with_components(delta, known, rank)[0]


def with_components(
    delta: torch.Tensor, known: ModuleMoments, rank: int
) -> tuple[Forecast, torch.Tensor, torch.Tensor]:
    """`forecast`, and A and B, of fewer components where few tokens reached the module."""
    most = max(rank, RANK_STEP)
    found = _by_outputs(delta, known, most) if len(delta) <= delta.shape[1] else _by_inputs(delta, known, most)
    if found.losses is None:
        total, correction = found.total, UNCORRECTED
    else:
        first = float(found.gains[:RANK_STEP].sum())
        whole, left = found.losses
        correction = TokenCorrection(ratio(whole - left, first), ratio(left, found.total - first))
    gains, total = correction(found.gains, found.total)
    known_gains = _padded(gains[:rank].cpu(), rank)
    return Forecast(total, known_gains, correction), found.lora_A[:rank], found.lora_B[:, :rank]


@dataclass(frozen=True)
class _Solved:
    """Components and losses by C; by C_g, those of the whole error and of what the first `RANK_STEP` leave."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    gains: torch.Tensor
    total: float
    losses: tuple[float, float] | None


def _by_outputs(delta: torch.Tensor, known: ModuleMoments, rank: int) -> _Solved:
    """From the second moments of the output's error, out × out, of a module that does not widen."""
    error = output_error(delta, known.inputs)
    if isinstance(known.inputs, RowMoment):
        # Of few rows there are no more components than rows.
        rank = min(rank, len(known.inputs.rows))
    lora_A, lora_B = eora_from_outputs(delta, error, rank, tolerance=TOLERANCE)
    losses = None
    if known.weighted is not None:
        weighted = output_error(delta, known.weighted)
        whole = output_loss(weighted, known.output)
        few = lora_B[:, :RANK_STEP].to(weighted.dtype)
        # P S P, P = I − B Bᵀ, since A = Bᵀ ΔW.
        weighted -= few @ (few.T @ weighted)
        weighted -= (weighted @ few) @ few.T
        losses = whole, output_loss(weighted, known.output)
    gains = output_gains(lora_B, error, known.output)
    return _Solved(lora_A, lora_B, gains, output_loss(error, known.output), losses)


def _by_inputs(delta: torch.Tensor, known: ModuleMoments, rank: int) -> _Solved:
    """From products of ΔW with moments of the inputs."""
    lora_A, lora_B = eora(delta, known.inputs, rank, tolerance=TOLERANCE)
    gains = component_gains(lora_A, lora_B, known.inputs, known.output)
    if known.weighted is None:
        return _Solved(lora_A, lora_B, gains, error_loss(delta, known.inputs, known.output), None)
    total, *losses = error_losses(
        delta, known.inputs, known.weighted, known.output, lora_A[:RANK_STEP], lora_B[:, :RANK_STEP]
    )
    return _Solved(lora_A, lora_B, gains, total, (losses[0], losses[1]))


def unreached(rank: int) -> Forecast:
    """Of a module that no calibration token reached: nothing is known to be lost."""
    return Forecast(0.0, torch.zeros(rank, dtype=torch.float64))


def _padded(gains: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.cat([gains, gains.new_zeros(rank - len(gains))]) if len(gains) < rank else gains


def ratio(found: float, expected: float) -> float:
    return max(found, 0.0) / expected if expected > 0 else 1.0
