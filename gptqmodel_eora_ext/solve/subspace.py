"""The dominant subspace of S = ΔW C ΔWᵀ.

Large problems: block Krylov iteration with Rayleigh-Ritz on the whole Krylov space (Musco and Musco, arXiv 1504.05477),
restarted from Ritz vectors, in products of S with a thin block. Products with S cost the same from either side of ΔW,
so iteration is on the output side, which needs no root of C. Products that only propose directions may be rounded; what
becomes of a direction, and what the convergence test reads, is multiplied in full. Small problems: a full
eigendecomposition on the smaller side. The oracle: an SVD of ΔW L, L Lᵀ = C, in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .decompositions import eigh, orthonormal
from .error import OutputError, WeightedError
from .moments import RowMoment

# If a product gains this share, or more, of what the one before it gained, then the iteration has hardly begun: the
# geometric series of what is still to come would not be bounded. Larger ratios count as this one.
SLOWEST_RATIO = 0.99
# If the ratio of gains is above this share of the ratio before it, then gains do not fall faster and faster. What is
# still to come is then assumed to be so many times larger than the geometric series says.
STEADY_RATIO, FLAT_MARGIN = 0.8, 3.0
# Width of a block over the rank. The same error takes 1.4 to 2 times fewer columns than with blocks wider than the
# rank, since the Krylov space has polynomials of a higher degree; narrower ones multiply too slowly.
BLOCK_SHARE = 0.625
LEAST_BLOCK = 16
# Entries of the list of gains from which the fall of gains can be told: what was captured before, and two gains.
GAINS_THAT_TELL = 3
# Random vectors that estimate the energy left, to within a tenth; the convergence test needs no better.
PROBES = 8
# Blocks that the Krylov space may hold before it is cut back to its best Ritz vectors.
MOST_BLOCKS = 20
# If the smaller side is below this many times (rank + block), then a full eigendecomposition is as fast as iterating.
DENSE_BELOW = 2
# Products of S with a block. Errors of quantised layers take 5 to 10; past this many a full eigendecomposition,
# which cannot fail, takes over.
MOST_PRODUCTS = 80
# Share of the energy below which float64's own rounding decides what a product gains, so the iteration stops there.
FLOAT64_RANGE = 1e-12


@dataclass(frozen=True)
class _Precision:
    """What the iteration runs in.

    Attributes:
        dtype: of the products that define and measure.
        rounded: whether those that only propose directions are taken in bfloat16.
        range: share of the energy; where the best correction leaves less, this is too coarse.
    """

    dtype: torch.dtype
    rounded: bool
    range: float


# Directions proposed in bfloat16 miss some 10^-5 of the energy: errors of 1.0005 to 1.0016 of the least were found with
# 1 to 2 % left, of 1.0002 with 8 %. What is left is told from sums over all of the energy; where it is less than a
# hundredth of that (outlier channels), float32 rounding of the sums is too large beside it.
PRECISIONS = (
    _Precision(torch.float32, True, 5e-2),
    _Precision(torch.float32, False, 1e-2),
    _Precision(torch.float64, False, 0.0),
)


def dominant_subspace(
    error: WeightedError | OutputError, rank: int, *, tolerance: float, seed: int, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal vectors U whose projection of ΔW keeps the most weighted energy, in order of energy.

    Args:
        error: ΔW (out × in) and C, or what they make.
        rank: number of vectors, at most min(out, in).
        tolerance: the iteration stops when the weighted error is predicted to be within this share of the least.
        seed: of the starting block.
        exact: skip iteration.

    Returns:
        Uᵀ (rank × out) and Uᵀ ΔW (rank × in; Uᵀ again for an `OutputError`); float64 where the work was done in it.
    """
    if exact:
        found = torch.linalg.svd(error.root(), full_matrices=False).U[:, :rank].T
        return found, error.project(found)
    if min(error.shape) > DENSE_BELOW * (rank + _block(rank)):
        usable = [
            precision
            for precision in PRECISIONS
            if error.dtype in (precision.dtype, torch.float32) and (error.rounds or not precision.rounded)
        ]
        converged = _block_krylov(error, rank, usable, tolerance, seed)
        if converged is not None:
            return converged
    found = _dense(error, rank)
    return found, error.project(found)


def _dense(error: WeightedError | OutputError, rank: int) -> torch.Tensor:
    """By a full eigendecomposition of the Gram matrix on the smaller side, in float64."""
    if isinstance(error, OutputError):
        return _top_eigenvectors(error.moment.to(torch.float64), rank)
    out_features, in_features = error.shape
    if isinstance(error.second_moment, RowMoment):
        image = error.root()
        if out_features <= image.shape[1]:
            return _top_eigenvectors(image @ image.T, rank)
    elif out_features <= in_features:
        delta = error.delta.to(torch.float64)
        return _top_eigenvectors(error.weigh(delta) @ delta.T, rank)
    else:
        image = error.root()
    # The Gram matrix squares the condition number; QR of the image restores orthonormal columns, and fills
    # directions of no energy (C of lower rank than asked) with arbitrary ones that A then weighs by Uᵀ ΔW.
    return orthonormal(image @ _top_eigenvectors(image.T @ image, rank).T).T


def _top_eigenvectors(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """As rows, largest eigenvalue first."""
    return eigh((gram + gram.T) / 2)[1][:, -rank:].flip(1).T


def _block_krylov(
    error: WeightedError | OutputError, rank: int, precisions: Sequence[_Precision], tolerance: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Iterate until the weighted error stops falling; None where it does not.

    The test is on the quantity that counts, not on the vectors, which for close eigenvalues never settle and need not.
    The error left is estimated on random probes with the found subspace projected out: the difference of the whole
    energy and the captured one would need the trace of S, which costs more than all of the iteration.

    Where rounded proposals turn out too coarse, the iteration goes on from the subspace that it has with proposals that
    are not rounded, since all else was multiplied in full. Where a dtype is too coarse it begins anew: S times a
    rounded vector leaves the space that holds it by just as much as is left to find. Continued from Ritz vectors, the
    iteration stalled at errors of up to 1.002 of the least, or took as many float64 products as from a random block.
    """
    ahead = list(precisions)
    precision = ahead.pop(0)
    least_gains = 0
    krylov = _Krylov(error, rank, precision, seed)
    for _ in range(MOST_PRODUCTS):
        krylov.multiply()
        if krylov.holds_enough:
            left = krylov.energy_left()
            if left >= precision.range * krylov.total:
                enough = _still_to_gain(krylov.gains) <= max(tolerance * left, FLOAT64_RANGE * krylov.total)
                if enough and len(krylov.gains) >= least_gains:
                    return krylov.found()
            else:
                coarse, precision = precision, ahead.pop(0)
                if precision.dtype != coarse.dtype:
                    krylov, least_gains = _Krylov(error, rank, precision, seed), 0
                    continue
                # What was gained so far tells nothing about proposals of the finer kind, and the first of their gains
                # may be small by chance: two of them tell how gains fall.
                krylov.gains, least_gains = [krylov.captured], GAINS_THAT_TELL
        krylov.propose(rounded=precision.rounded)
    return None


class _Krylov:
    """The iteration's state in one dtype.

    It begins with a random block, and with probes of the same source of random numbers, which are independent of it.

    Args:
        error: whose S it is.
        rank: vectors that are wanted.
        precision: of all products; whether later proposals are rounded is told to `propose`.
        seed: of the random numbers.

    Attributes:
        total: energy of S, in its unit; known after the first product.
        captured: energy of the best ``rank`` Ritz vectors.
        gains: what each product added to it, the first of all being what the first blocks captured.
    """

    def __init__(self, error: WeightedError | OutputError, rank: int, precision: _Precision, seed: int) -> None:
        self._error = error
        self._rank = rank
        self._block = _block(rank)
        self._widest = min(MOST_BLOCKS * self._block, min(error.shape) - self._block)
        generator = torch.Generator().manual_seed(seed)
        out_features, in_features = error.shape
        self._probes = torch.randn(PROBES, out_features, generator=generator, dtype=precision.dtype).to(error.device)
        # Random rows take the place of Y ΔW for a random Y, which would take another product. They are scaled to the
        # size that Y ΔW would have, since `unit` divides by it.
        start = torch.randn(self._block, in_features, generator=generator, dtype=precision.dtype).to(error.device)
        start *= error.largest
        # The orthonormal rows that the next product is of.
        self._fresh = _orthonormal(error.lift(error.weigh_evenly(start), rounded=precision.rounded))
        self._space = _Space(self._probes, in_features, self._widest + self._block)
        self._probes_projected: torch.Tensor | None = None
        self.total = self.captured = 0.0
        self.gains: list[float] = []

    def multiply(self) -> None:
        """Take the product of S with the fresh rows, and add them to the space."""
        count = len(self._fresh)
        # The probes are multiplied together with the first block.
        rows = torch.cat([self._fresh, self._probes]) if self._probes_projected is None else self._fresh
        projected = self._error.project(rows)
        weighed = self._error.weigh_evenly(projected)
        if self._probes_projected is None:
            self._probes_projected = projected[count:].clone()
            self._energies = (self._probes_projected.to(torch.float64) * weighed[count:]).sum(1)
            self.total = float(self._energies.mean())
        self._weighed = weighed[:count]
        self._space.add(self._fresh, projected[:count], self._weighed, self._weighed @ self._probes_projected.T)
        if self.holds_enough:
            self._values, self._rotation = _ritz(self._space.gram)
            self.gains.append(float(self._values[: self._rank].sum()) - self.captured)
            self.captured += self.gains[-1]

    @property
    def holds_enough(self) -> bool:
        """Whether the space has a block more than the rank, so that what a product gains can be told."""
        return self._space.rows >= self._rank + self._block

    def energy_left(self) -> float:
        """Energy outside the best ``rank`` Ritz vectors, estimated on the probes."""
        top = self._rotation[: self._rank]
        space = self._space
        return _energy_outside(
            self._energies, top @ space.inside, top @ space.images_inside, self._values[: self._rank]
        )

    def found(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Uᵀ and Uᵀ ΔW."""
        top = self._rotation[: self._rank]
        return top @ self._space.basis, top @ self._space.projected

    def propose(self, *, rounded: bool) -> None:
        """Make the next fresh rows, and room for them."""
        self._fresh = _orthonormal(self._error.lift(self._weighed, rounded=rounded), self._space.basis)
        if self.holds_enough and self._space.rows + self._block > self._widest:
            kept = self._rank + self._block
            self._space.keep(self._values[:kept], self._rotation[:kept])


class _Space:
    """Orthonormal rows Y, and with them Y ΔW, Y S Yᵀ, Y zᵀ and Y S zᵀ, S in its unit.

    Args:
        probes: z, in rows.
        in_features: width of Y ΔW.
        most: rows that there is room for; what is not touched costs nothing.
    """

    def __init__(self, probes: torch.Tensor, in_features: int, most: int) -> None:
        self._probes = probes
        self._basis = probes.new_empty(most, probes.shape[1])
        self._projected = probes.new_empty(most, in_features)
        self.rows = 0
        self.gram = probes.new_empty(0, 0)
        self.inside = self.images_inside = probes.new_empty(0, len(probes))

    @property
    def basis(self) -> torch.Tensor:
        """Y, rows × out."""
        return self._basis[: self.rows]

    @property
    def projected(self) -> torch.Tensor:
        """Y ΔW, rows × in."""
        return self._projected[: self.rows]

    def add(self, block: torch.Tensor, projected: torch.Tensor, weighed: torch.Tensor, images: torch.Tensor) -> None:
        """Rows of Y, and of Y ΔW, Y ΔW C and Y S zᵀ."""
        begin = self.rows
        self._write(begin, block, projected)
        border = weighed @ self.projected.T
        self.gram = torch.cat([torch.cat([self.gram, border[:, :begin].T], dim=1), border])
        self.inside = torch.cat([self.inside, block @ self._probes.T])
        self.images_inside = torch.cat([self.images_inside, images])

    def keep(self, values: torch.Tensor, rotation: torch.Tensor) -> None:
        """Of all rows these Ritz vectors, in which Y S Yᵀ is the diagonal of ``values``."""
        self._write(0, rotation @ self.basis, rotation @ self.projected)
        self.gram = torch.diag(values).to(rotation.dtype)
        self.inside, self.images_inside = rotation @ self.inside, rotation @ self.images_inside

    def _write(self, begin: int, block: torch.Tensor, projected: torch.Tensor) -> None:
        self.rows = begin + len(block)
        self._basis[begin : self.rows] = block
        self._projected[begin : self.rows] = projected


def _block(rank: int) -> int:
    return max(LEAST_BLOCK, math.ceil(BLOCK_SHARE * rank))


def _still_to_gain(gains: list[float]) -> float:
    """Energy that further products would add. Gains fall geometrically, g, g q, g q², …: g q / (1 - q) follow the last.

    Where q itself falls from product to product, as on decaying spectra, that is on the safe side; where it does not,
    as on flat ones, `FLAT_MARGIN` makes it so. The first entry is what the first blocks captured, no gain, and the next
    has no predecessor to tell its q.
    """
    if len(gains) < GAINS_THAT_TELL:
        return gains[-1] if len(gains) == 2 else math.inf
    ratios = [_ratio(last, before) for before, last in itertools.pairwise(gains[1:])]
    predicted = gains[-1] * ratios[-1] / (1 - ratios[-1])
    accelerates = len(ratios) < 2 or ratios[-1] < STEADY_RATIO * ratios[-2]
    return predicted if accelerates else FLAT_MARGIN * predicted


def _ratio(last: float, before: float) -> float:
    return min(max(last / before, 0.0), SLOWEST_RATIO) if before > 0 else 0.0


def _ritz(small: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (float64) and eigenvectors, as rows, of a small symmetric matrix, largest first."""
    values, vectors = eigh((small + small.T) / 2)
    return values.flip(0).to(torch.float64), vectors.flip(1).T


def _energy_outside(
    energies: torch.Tensor, inside: torch.Tensor, images_inside: torch.Tensor, values: torch.Tensor
) -> float:
    """Mean of z P S P zᵀ over the probes z, P = I − Uᵀ U, from z S zᵀ, U zᵀ and U S zᵀ: an estimate of tr(P S P).

    The rows of U are Ritz vectors, so that U S Uᵀ is the diagonal of ``values``.
    """
    inside, images_inside = inside.to(torch.float64), images_inside.to(torch.float64)
    captured = (inside.square() * values[:, None] - 2 * inside * images_inside).sum(0)
    return max(float((energies + captured).mean()), 0.0)


def _orthonormal(block: torch.Tensor, basis: torch.Tensor | None = None) -> torch.Tensor:
    """Orthonormal rows that span the block's part outside ``basis``; two passes, for the rounding of the first."""
    if basis is None:
        return orthonormal(block.T).T
    for _ in range(2):
        block = orthonormal((block - block @ basis.T @ basis).T).T
    return block
