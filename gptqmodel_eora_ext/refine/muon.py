"""Steps of all factors: orthogonalised momentum (Muon), for inputs of one size.

With M the running mean of a factor's gradient, W diagonal, and orth(X) = (X Xᵀ)^-½ X:

    A  (rank × in)     orth(M W) W √(16 in / rank)
    Bᵀ (rank × out)    orth(M) √(16 out / rank)

Along every direction that M has, the step is as long as along any other, where Adam's is long along the few of them
that a window's gradient is full of. W divides each column of A by the root of its mean squared gradient, relative to
the median column's: a few inputs of a transformer's layers are a hundred times as large as the others, and a step of
one size in their column is one of a hundred times the size in the output.

A value moves by about the learning rate where the rank is 16, and a step is as long in all for any rank. Most
directions of a window's gradient are noise, the more the higher the rank: were steps as long in each of them for any
rank, modules with most of a budget would drown the others.
"""

from __future__ import annotations

import math

import torch

from .factors import TrainedFactors

# Of the gradient's running mean, over some five windows. Orthogonalised, an old gradient is stepped along as far as a
# new one: of 64 steps, those with 0.95 ended far above those with 0.9.
MOMENTUM = 0.8
# Of the running mean of each column's squared gradient, over the rows of A.
COLUMNS = 0.95
# A column's mean squared gradient, relative to the median's, is taken for at least this much: inputs that hardly ever
# are anything but zero would else be stepped along without end.
LEAST_COLUMN = 1e-3
# Of the polynomial a x + b x³ + c x⁵ that takes singular values from 1e-3 to 1 between 0.7 and 1.2 when it is applied
# five times (Keller Jordan, https://kellerjordan.github.io/posts/muon/).
POLYNOMIAL, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# The rank at which a value moves by about the learning rate; SmolLM2's with half a bit are 8 to 328.
RANK = 16

TINY = torch.finfo(torch.float32).tiny


class Muon:
    """Steps the master copy of factors by their gradient.

    Args:
        factors: what is stepped.

    Attributes:
        mean: running mean of the gradient, groups × group_size, float32.
        columns: running mean of the squared gradient of A's columns, one module after another, float32.
    """

    def __init__(self, factors: TrainedFactors) -> None:
        self._factors = factors
        self.mean = torch.zeros_like(factors.master)
        widths = [down.shape[1] for down in list(factors.split(factors.master))[::2]]
        self.columns = factors.master.new_zeros(sum(widths))
        # Of each factor, as `TrainedFactors.split` has them in turn; None for Bᵀ.
        self._columns = [one for columns in self.columns.split(widths) for one in (columns, None)]

    def step(self, rate: float) -> None:
        """Take a step at a learning rate, and set the gradient to zero."""
        factors = self._factors
        parts = map(factors.split, (factors.master, factors.gradient, self.mean))
        for value, gradient, mean, columns in zip(*parts, self._columns, strict=True):
            # Experts that no token of the window has reached stay: orthogonalised, the little that is left of an old
            # mean would be a whole step.
            if not gradient.any():
                continue
            now = gradient.to(torch.float32)
            mean.lerp_(now, 1 - MOMENTUM)
            if columns is None:
                step = orthogonal(mean)
            else:
                # Of both running means the proportions alone matter, so neither is divided by its weights' sum so far.
                columns.lerp_(now.square().mean(0), 1 - COLUMNS)
                even = (columns / columns.median().clamp_min(TINY)).clamp_min_(LEAST_COLUMN).rsqrt_()
                step = orthogonal(mean * even).mul_(even)
            value.sub_(step, alpha=rate * math.sqrt(value.shape[1] * RANK / len(value)))
        factors.gradient.zero_()


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with its singular vectors whose singular values are all near 1, those below a thousandth less so.

    The polynomial is applied to rows × rows matrices, which commute: the result is P X, P a polynomial of X Xᵀ.
    """
    found = matrix / matrix.norm().clamp_min(TINY)
    square = found @ found.T
    product = torch.eye(len(matrix), device=matrix.device)
    first, third, fifth = POLYNOMIAL
    for _ in range(ITERATIONS):
        factor = third * square + fifth * (square @ square)
        factor.diagonal().add_(first)
        product = factor @ product
        square = factor @ square @ factor
    return product @ found


def rate_of(rate: float, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0: from ``rate`` in a straight line to zero after the last.

    Steps are as long for a gradient that is all noise as for another, so the rate alone lets the noise fade.
    """
    return rate * (1 - step / steps)
