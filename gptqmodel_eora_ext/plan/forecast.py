"""What widths and ranks will buy in a module, told before it is quantised: from the error that it will have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..solve import (
    Curve,
    Moment,
    RowMoment,
    directions,
    halves,
    halves_loss,
    output_error,
    output_gains,
    output_loss,
    rank_curve,
    square_root,
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
        correction: the factors that ``total`` and ``gains`` have been multiplied by already.
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
    return with_components(delta, known, rank, 0)[0]


def with_components(
    delta: torch.Tensor, known: ModuleMoments, rank: int, factors: int
) -> tuple[Forecast, torch.Tensor, torch.Tensor]:
    """`forecast`, and A and B of the first ``factors`` components; of fewer where few tokens reached the module."""
    solve = _by_outputs if len(delta) <= delta.shape[1] else _by_inputs
    found = solve(delta, known, max(rank, RANK_STEP), max(factors, RANK_STEP))
    total, correction = found.total, UNCORRECTED
    if known.weighted is not None:
        first = float(found.gains[:RANK_STEP].sum())
        correction = TokenCorrection(ratio(found.whole - found.left, first), ratio(found.left, total - first))
    gains, total = correction(found.gains, total)
    lora_B = found.lora_B[:, :factors]
    return Forecast(total, _padded(gains[:rank].cpu(), rank), correction), lora_B.T @ delta, lora_B


@dataclass(frozen=True)
class _Solved:
    """Components and losses of a module.

    Attributes:
        gains: of each component, by C and G.
        lora_B: of the first, orthonormal.
        total: loss without any, by C and G.
        whole: by C_g in place of C; nothing without it.
        left: the same of what the first `RANK_STEP` components leave.
    """

    gains: torch.Tensor
    lora_B: torch.Tensor
    total: float
    whole: float = 0.0
    left: float = 0.0


def _by_outputs(delta: torch.Tensor, known: ModuleMoments, rank: int, factors: int) -> _Solved:
    """From second moments of the output's error, out × out, of a module that does not widen."""
    error = output_error(delta, known.inputs)
    lora_B = directions(error, _most(delta, known, rank), tolerance=TOLERANCE)
    gains, total = output_gains(lora_B, error, known.output), output_loss(error, known.output)
    lora_B = lora_B[:, :factors]
    if known.weighted is None:
        return _Solved(gains, lora_B, total)
    weighted = output_error(delta, known.weighted)
    whole, few = output_loss(weighted, known.output), lora_B[:, :RANK_STEP]
    # P S P, P = I − B Bᵀ, since A = Bᵀ ΔW.
    weighted -= few @ (few.T @ weighted)
    weighted -= (weighted @ few) @ few.T
    return _Solved(gains, lora_B, total, whole, output_loss(weighted, known.output))


def _by_inputs(delta: torch.Tensor, known: ModuleMoments, rank: int, factors: int) -> _Solved:
    """From those of the other side of ΔW, of a module that widens."""
    root = square_root(known.inputs).to(delta.dtype)
    inner = root.T @ (delta.T @ delta) @ root if len(root) == root.shape[1] else _gram(delta @ root)
    vectors = root @ directions(inner, _most(delta, known, rank), tolerance=TOLERANCE)
    # √λ u of the first; QR has them orthonormal where λ is next to nothing.
    lora_B = torch.linalg.qr(delta @ vectors[:, :factors]).Q
    left, right = halves(known.output, delta)
    gains = ((left @ vectors) * (right @ vectors)).sum(0, dtype=torch.float64) / 2
    total = halves_loss(left, right, known.inputs)
    if known.weighted is None:
        return _Solved(gains, lora_B, total)
    whole, few = halves_loss(left, right, known.weighted), lora_B[:, :RANK_STEP]
    corrected = few.T @ delta
    left, right = (
        half - first @ corrected for half, first in zip((left, right), halves(known.output, few), strict=True)
    )
    return _Solved(gains, lora_B, total, whole, halves_loss(left, right, known.weighted))


def _most(delta: torch.Tensor, known: ModuleMoments, rank: int) -> int:
    """Components that there are at most: of few rows no more than rows."""
    rows = [len(known.inputs.rows)] if isinstance(known.inputs, RowMoment) else []
    return min(rank, *delta.shape, *rows)


def _gram(image: torch.Tensor) -> torch.Tensor:
    return image.T @ image


def unreached(rank: int) -> Forecast:
    """Of a module that no calibration token reached: nothing is known to be lost."""
    return Forecast(0.0, torch.zeros(rank, dtype=torch.float64))


def _padded(gains: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.cat([gains, gains.new_zeros(rank - len(gains))]) if len(gains) < rank else gains


def ratio(found: float, expected: float) -> float:
    return max(found, 0.0) / expected if expected > 0 else 1.0
