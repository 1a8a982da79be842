"""Choices for many modules under one budget of bytes: what a rank buys in each, and which to take.

Every module has a list of options (a rank, or bits and a rank), each with its bytes and the loss that it leaves. Taking
one option a module with the least total loss under a budget is a multiple-choice knapsack. `allocate` solves it exactly
by dynamic programming. `price` finds the Lagrange multiplier at which every module may choose for itself, which is what
a loop needs that meets the modules one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .error import OutputError, WeightedError
from .moments import Moment, RowMoment
from .subspace import dominant_subspace

# A budget is divided into at most so many steps: the table of 210 modules and 64 options then takes seconds. Costs that
# are no whole number of steps are rounded up, so that the budget is never exceeded.
MOST_STEPS = 20_000
# The price is found by halving an interval; so many halvings tell any two float64 losses apart.
BISECTIONS = 100


@dataclass(frozen=True)
class Curve:
    """The options of one module.

    Attributes:
        nbytes: of each option, ascending.
        losses: what each leaves, in any unit that all modules share.
    """

    nbytes: tuple[int, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.nbytes or len(self.nbytes) != len(self.losses):
            raise ValueError(f"a curve needs bytes and losses alike, got {len(self.nbytes)} and {len(self.losses)}.")

    def best_at(self, price: float, most: float = math.inf) -> int:
        """Index of the option with the least loss + price · bytes, among those of at most ``most`` bytes.

        The first option is taken where none fits.
        """
        fitting = [index for index, size in enumerate(self.nbytes) if size <= most] or [0]
        return min(fitting, key=lambda index: self.losses[index] + price * self.nbytes[index])

    def scaled(self, factor: float) -> Curve:
        """The same options, their losses times ``factor``."""
        return Curve(self.nbytes, tuple(loss * factor for loss in self.losses))

    def first(self, count: int) -> Curve:
        """The smallest so many options."""
        return Curve(self.nbytes[:count], self.losses[:count])


def rank_curve(gains: torch.Tensor, total: float, ranks: Sequence[int], nbytes: Sequence[int]) -> Curve:
    """The curve of a module whose components each take a gain off the loss.

    Args:
        gains: of every component, in the order in which they are kept.
        total: loss without any.
        ranks: options, ascending, none above the number of gains.
        nbytes: bytes of each.
    """
    left = total - torch.cat([gains.new_zeros(1), gains.clamp_min(0).cumsum(0)])
    return Curve(tuple(nbytes), tuple(max(float(left[rank]), 0.0) for rank in ranks))


def component_gains(
    lora_A: torch.Tensor, lora_B: torch.Tensor, second_moment: Moment, output_moment: Moment
) -> torch.Tensor:
    """What each component of an `eora` solution takes off ½ tr(G E), E the second moment of the output's error.

    With U = B orthonormal eigenvectors of S = ΔW C ΔWᵀ, the error left by a set of components is P S P, and
    tr(G S) − tr(G P S P) = Σ λᵢ uᵢᵀ G uᵢ over the set: components add up, in any order.

    Args:
        lora_A: rank × in, as `eora` returns it.
        lora_B: out × rank, orthonormal.
        second_moment: C, in × in, or the rows that it is of, or its diagonal where the factors are those of `diagonal`.
        output_moment: G, out × out, or the rows that it is of, or its diagonal.

    Returns:
        Of length rank, float64.
    """
    error = WeightedError(lora_A, second_moment)
    energies = (error.weigh(lora_A) * lora_A).sum(1, dtype=torch.float64)
    left, right = halves(output_moment, lora_B)
    return energies * (left * right).sum(0, dtype=torch.float64) / 2


def error_loss(delta: torch.Tensor, second_moment: Moment, output_moment: Moment) -> float:
    """½ tr(G ΔW C ΔWᵀ): what the error costs in loss, in nats a token where G is of the loss's gradient.

    Args:
        delta: ΔW, out × in.
        second_moment: C, in × in, or the rows that it is of, or its diagonal.
        output_moment: G, out × out, or the rows that it is of, or its diagonal.
    """
    return halves_loss(*halves(output_moment, delta), second_moment)


def output_error(delta: torch.Tensor, second_moment: Moment) -> torch.Tensor:
    """S = ΔW C ΔWᵀ, the second moment of the output's error, out × out, in ΔW's dtype.

    Args:
        delta: ΔW, out × in.
        second_moment: C, in × in, or the rows that it is of, or its diagonal.
    """
    if isinstance(second_moment, RowMoment):
        image = second_moment.image(delta.T)
        return image.T @ image
    return WeightedError(delta, second_moment).weigh(delta) @ delta.T


def output_loss(error_moment: torch.Tensor, output_moment: Moment) -> float:
    """½ tr(G S): `error_loss` from `output_error`.

    Args:
        error_moment: S, out × out.
        output_moment: G, out × out, or the rows that it is of, or its diagonal.
    """
    if isinstance(output_moment, RowMoment):
        rows = output_moment.rows.to(error_moment.dtype)
        return _inner(rows @ error_moment, rows) / output_moment.count / 2
    weighed = error_moment.diagonal() if output_moment.ndim == 1 else error_moment
    return _inner(output_moment.to(weighed.dtype), weighed) / 2


def directions(error_moment: torch.Tensor, rank: int, *, tolerance: float) -> torch.Tensor:
    """The leading eigenvectors of a second moment of errors, features × rank, orthonormal.

    Args:
        error_moment: S, features × features.
        rank: at most features.
        tolerance: share by which the energy outside them may exceed the least.
    """
    found, _ = dominant_subspace(OutputError(error_moment), rank, tolerance=tolerance, seed=0, exact=False)
    return found.T.to(error_moment.dtype)


def output_gains(lora_B: torch.Tensor, error_moment: torch.Tensor, output_moment: Moment) -> torch.Tensor:
    """`component_gains` from `output_error`.

    Args:
        lora_B: out × rank, orthonormal eigenvectors of S.
        error_moment: S, out × out.
        output_moment: G, out × out, or the rows that it is of, or its diagonal.

    Returns:
        Of length rank, float64.
    """
    energies = (error_moment @ lora_B * lora_B).sum(0, dtype=torch.float64).clamp_min(0)
    left, right = halves(output_moment, lora_B)
    return energies * (left * right).sum(0, dtype=torch.float64) / 2


def halves(output_moment: Moment, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L and R with Lᵀ R = Mᵀ G M for M of out × k: G M and M, or X M / √n twice where G is of the rows X.

    Both are linear in M, so that halves of several M may be mixed. They tell from the input side, too, what a component
    takes off: with H Hᵀ = C, Hᵀ ΔWᵀ ΔW H has the eigenvalues of S = ΔW C ΔWᵀ, and its eigenvectors vᵢ are those of S by
    √λᵢ uᵢ = ΔW H vᵢ; so λᵢ uᵢᵀ G uᵢ = (L H vᵢ)ᵀ (R H vᵢ) for the halves of ΔW, without a division.

    Args:
        output_moment: G, out × out, or the rows that it is of, or its diagonal.
        columns: M, out × k.
    """
    if isinstance(output_moment, RowMoment):
        image = output_moment.image(columns)
        return image, image
    moment = output_moment.to(columns.dtype)
    return moment[:, None] * columns if moment.ndim == 1 else moment @ columns, columns


def halves_loss(left: torch.Tensor, right: torch.Tensor, second_moment: Moment) -> float:
    """`error_loss` from the halves of ΔW."""
    return _inner(left, WeightedError(right, second_moment).weigh(right)) / 2


def _inner(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first * second).sum(dtype=torch.float64))


def allocate(curves: Sequence[Curve], budget: int, *, steps: int = MOST_STEPS) -> list[int]:
    """The option of each module with the least total loss within ``budget`` bytes.

    Exact where the bytes of all options have a common divisor of at least budget / ``steps``; otherwise bytes are
    rounded up to a step of that size, which leaves at most a step a module unused.

    Args:
        curves: of all modules.
        budget: bytes.
        steps: that the budget is divided into at most; time and memory grow with it.

    Raises:
        ValueError: when even the smallest options do not fit.
    """
    least = sum(min(curve.nbytes) for curve in curves)
    if least > budget:
        raise ValueError(f"a budget of {budget} bytes is below the {least} bytes of the smallest choice everywhere.")
    step = math.gcd(*(size for curve in curves for size in curve.nbytes)) or 1
    step = max(step, -(-budget // steps))
    steps = budget // step
    if sum(-(-min(curve.nbytes) // step) for curve in curves) > steps:
        # Rounded up to steps, even the smallest options do not fit; there is no other choice than to take them.
        return [min(range(len(curve.nbytes)), key=curve.nbytes.__getitem__) for curve in curves]
    best = torch.zeros(steps + 1, dtype=torch.float64)
    taken: list[torch.Tensor] = []
    for curve in curves:
        following = torch.full_like(best, torch.inf)
        choice = torch.zeros(steps + 1, dtype=torch.int32)
        for index, (size, loss) in enumerate(zip(curve.nbytes, curve.losses, strict=True)):
            width = -(-size // step)
            if width > steps:
                continue
            reached = best[: steps + 1 - width] + loss
            better = reached < following[width:]
            following[width:] = torch.where(better, reached, following[width:])
            choice[width:] = torch.where(better, index, choice[width:])
        best = following
        taken.append(choice)
    left = steps
    chosen: list[int] = []
    for curve, choice in zip(reversed(curves), reversed(taken), strict=True):
        index = int(choice[left])
        chosen.append(index)
        left -= -(-curve.nbytes[index] // step)
    return chosen[::-1]


def price(curves: Sequence[Curve], budget: float) -> float:
    """The least loss a byte must save to be spent, so that all modules together stay within ``budget`` bytes."""

    if not curves:
        return 0.0
    longest = max(len(curve.nbytes) for curve in curves)
    # Shorter lists are filled up by repeating their last option, which changes no choice.
    nbytes = torch.tensor([_padded(curve.nbytes, longest) for curve in curves], dtype=torch.float64)
    losses = torch.tensor([_padded(curve.losses, longest) for curve in curves], dtype=torch.float64)

    def spent(at: float) -> float:
        return float(nbytes.gather(1, (losses + at * nbytes).argmin(1, keepdim=True)).sum())

    if spent(0.0) <= budget:
        return 0.0
    low, high = 0.0, float(losses.max()) + 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    return high


def _padded(values: tuple[int, ...] | tuple[float, ...], length: int) -> list[float]:
    return [*values, *[values[-1]] * (length - len(values))]
