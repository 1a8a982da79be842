"""Forecasts of one module: the loss that it will cost at a width, and what each component of an adapter takes off.

Both are computed before the module is quantised, from the error ΔW that it will have.
"""

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
    orthonormal,
    output_error,
    output_gains,
    output_loss,
    rank_curve,
    square_root,
)
from .ranks import RANK_STEP, RankOptions, TokenCorrection

UNCORRECTED = TokenCorrection()
# The weighted error that a forecast's components leave may exceed the least possible one by this share. The factors
# that are kept are solved for again in the loop, with a smaller tolerance.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Forecast:
    """What a module is predicted to lose at one width of its weights, and to win back by an adapter.

    Losses are in nats a token where G comes from gradients; by "relative" they are half of E‖ΔW x‖² / E‖W x‖².

    Attributes:
        total: predicted loss without an adapter.
        gains: what each component takes off the loss, float64, on the CPU, in the order in which `eora` returns
            components. What several take off together is the sum of their gains.
        correction: factors by which ``total`` and ``gains`` have been multiplied already.
    """

    total: float
    gains: torch.Tensor
    correction: TokenCorrection = UNCORRECTED

    def curve(self, options: RankOptions) -> Curve:
        """Loss against bytes for the ranks on offer, where each rank keeps the components that gain most."""
        ordered = self.gains.sort(descending=True).values
        return rank_curve(ordered, self.total, options.ranks, options.nbytes)

    def left(self, rank: int) -> float:
        """Loss that is left with the first ``rank`` components."""
        return self.total - float(self.gains[:rank].sum())

    def scaled(self, factor: float) -> Forecast:
        """All losses times ``factor``."""
        return Forecast(self.total * factor, self.gains * factor, self.correction.scaled(factor))


@dataclass(frozen=True)
class ModuleMoments:
    """The second moments that a module's forecast is computed from, float32.

    Each is a matrix of features × features, or the rows that it is the moment of (`RowMoment`), where these are fewer.

    Attributes:
        inputs: C = E[x xᵀ], in × in, of the full-precision model's inputs.
        output: G = E[g gᵀ], out × out, of the loss's gradient at the output; or a diagonal, of length out, that makes
            modules comparable.
        weighted: C_g = E[‖g‖² x xᵀ] / E‖g‖², in × in; None where there are no gradients.
    """

    inputs: Moment
    output: Moment
    weighted: Moment | None = None


def forecast(delta: torch.Tensor, known: ModuleMoments, rank: int) -> Forecast:
    """Predict the loss of a module without an adapter, and what each of ``rank`` components takes off.

    Args:
        delta: ΔW = W − Ŵ, out × in, float32, of the checkpoint's Ŵ or of that of a quick GPTQ.
        known: the module's second moments, on the device of ``delta``.
        rank: number of gains to return; 0 for none.
    """
    return with_components(delta, known, rank, 0)[0]


def with_components(
    delta: torch.Tensor, known: ModuleMoments, rank: int, factors: int
) -> tuple[Forecast, torch.Tensor, torch.Tensor]:
    """As `forecast`; returned beside it are A and B of the first ``factors`` components.

    A is factors × in and B out × factors, on the device of ``delta``. There are fewer components where few tokens
    reached the module.
    """
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
    """Components and losses of a module. C, C_g and G are those of `ModuleMoments`.

    Attributes:
        gains: what each component takes off the loss, by C and G.
        lora_B: B of the first components, out × count, orthonormal.
        total: loss without any component, by C and G.
        whole: the same loss by C_g and G; 0 where there is no C_g.
        left: loss that the first `RANK_STEP` components leave, by C_g and G.
    """

    gains: torch.Tensor
    lora_B: torch.Tensor
    total: float
    whole: float = 0.0
    left: float = 0.0


def _by_outputs(delta: torch.Tensor, known: ModuleMoments, rank: int, factors: int) -> _Solved:
    """Solve by the second moment of the output's error, out × out: the smaller matrix where out ≤ in."""
    error = output_error(delta, known.inputs)
    lora_B = directions(error, _most(delta, known, rank), tolerance=TOLERANCE)
    gains, total = output_gains(lora_B, error, known.output), output_loss(error, known.output)
    lora_B = lora_B[:, :factors]
    if known.weighted is None:
        return _Solved(gains, lora_B, total)
    weighted = output_error(delta, known.weighted)
    whole, few = output_loss(weighted, known.output), lora_B[:, :RANK_STEP]
    # With A = Bᵀ ΔW the error left is P ΔW, P = I − B Bᵀ, and the second moment of its output is P S P.
    weighted -= few @ (few.T @ weighted)
    weighted -= (weighted @ few) @ few.T
    return _Solved(gains, lora_B, total, whole, output_loss(weighted, known.output))


def _by_inputs(delta: torch.Tensor, known: ModuleMoments, rank: int, factors: int) -> _Solved:
    """Solve by Lᵀ ΔWᵀ ΔW L with L Lᵀ = C, in × in: the smaller matrix where in < out."""
    root = square_root(known.inputs).to(delta.dtype)
    inner = root.T @ (delta.T @ delta) @ root if len(root) == root.shape[1] else _gram(delta @ root)
    vectors = root @ directions(inner, _most(delta, known, rank), tolerance=TOLERANCE)
    # These columns are √λ u. QR makes them orthonormal, also where λ is too small to divide by.
    lora_B = orthonormal(delta @ vectors[:, :factors])
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
    """The number of components to find: at most ``rank``, and no more than ΔW or the rows of inputs can have."""
    rows = [len(known.inputs.rows)] if isinstance(known.inputs, RowMoment) else []
    return min(rank, *delta.shape, *rows)


def _gram(image: torch.Tensor) -> torch.Tensor:
    return image.T @ image


def unreached(rank: int) -> Forecast:
    """The forecast of a module that no calibration token reached: no loss is known, so no component gains."""
    return Forecast(0.0, torch.zeros(rank, dtype=torch.float64))


def _padded(gains: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.cat([gains, gains.new_zeros(rank - len(gains))]) if len(gains) < rank else gains


def ratio(found: float, expected: float) -> float:
    """``found`` over ``expected``, at least 0; 1 where nothing was expected, so that nothing is changed by it."""
    return max(found, 0.0) / expected if expected > 0 else 1.0
