"""A weight error under a second moment: the products that solvers need, and the energy it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch

from .decompositions import NotDefinite, eigh, upper_root
from .moments import Moment, RowMoment, diagonal_of, times

# A symmetric moment is multiplied in so many block columns, each from the diagonal down: with 8 of them that takes 9/16
# of the products of the whole.
ENERGY_BLOCKS = 8
# Rows of ΔW that are rounded to bfloat16 at a time. A product with a 4096 × 4096 ΔW then takes 13 ms, in place of 24
# in float32. Rounding all of ΔW once would make the product 9 ms, but making the copy takes 20, since the system
# clears its pages first.
ROUNDED_ROWS = 128


@dataclass(frozen=True)
class WeightedError:
    """ΔW and C, and with them the symmetric operator S = ΔW C ΔWᵀ, which is never formed for a large ΔW.

    Attributes:
        delta: ΔW, out × in, float32 or float64.
        second_moment: C: in × in; or its diagonal, of length in; or the rows that it is of; or None for the identity.
    """

    delta: torch.Tensor
    second_moment: Moment | None

    @cached_property
    def largest(self) -> float:
        """The largest entry of ΔW by size, and with it the size of Y ΔW; 1 where all are 0."""
        return _largest(self.delta)

    @cached_property
    def unit(self) -> float:
        """What S is divided by in `weigh_evenly`, so that it neither overflows nor underflows float32.

        NaN or infinite where ΔW or C is.
        """
        moment = self.second_moment
        if moment is None:
            return self.largest**2
        # No entry of a semidefinite matrix is larger than the largest of its diagonal.
        return self.largest**2 * _largest(moment.diagonal() if isinstance(moment, RowMoment) else moment)

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.delta.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the problem is given in."""
        return self.delta.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.delta.device

    @property
    def rounds(self) -> bool:
        """Whether `lift` is faster rounded."""
        return self.dtype is torch.float32 and multiplies_bfloat16(self.device)

    def weigh(self, rows: torch.Tensor) -> torch.Tensor:
        """X C for X of k × in, in X's dtype."""
        moment = self.second_moment
        if moment is None:
            return rows
        if isinstance(moment, RowMoment):
            return moment.weigh(rows)
        if moment.ndim == 1:
            return rows * moment.to(rows.dtype)
        return times(rows, moment)

    def channel_energies(self) -> torch.Tensor:
        """E[x²] of each input channel: the diagonal of C."""
        moment = self.second_moment
        if moment is None:
            return torch.ones(self.delta.shape[1], device=self.device)
        return diagonal_of(moment)

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """Y ΔW for Y of k × out."""
        return times(rows, self.delta)

    def weigh_evenly(self, projected: torch.Tensor) -> torch.Tensor:
        """Y ΔW C / unit from Y ΔW."""
        return self.weigh(projected / self.unit)

    def lift(self, weighed: torch.Tensor, *, rounded: bool) -> torch.Tensor:
        """Y S / unit from Y ΔW C / unit; with ``rounded`` in bfloat16."""
        return _rounded_times(weighed, self.delta) if rounded else times(weighed, self.delta.T)

    def root(self) -> torch.Tensor:
        """ΔW L, float64, out × in, with any L Lᵀ = C."""
        delta = self.delta.to(torch.float64)
        moment = self.second_moment
        if moment is None:
            return delta
        if moment.ndim == 1 and isinstance(moment, torch.Tensor):
            return delta * moment.to(torch.float64).clamp_min(0).sqrt()
        return delta @ square_root(moment)


@dataclass(frozen=True)
class OutputError:
    """The same operator where it was summed as such: S = E[(ΔW x)(ΔW x)ᵀ].

    Attributes:
        moment: S, out × out.
    """

    moment: torch.Tensor

    @property
    def largest(self) -> float:
        """As `WeightedError.largest`, of the identity."""
        return 1.0

    @cached_property
    def unit(self) -> float:
        """As `WeightedError.unit`."""
        return _largest(self.moment)

    @property
    def shape(self) -> torch.Size:
        """(out, out)."""
        return self.moment.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the problem is given in."""
        return self.moment.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.moment.device

    @property
    def rounds(self) -> bool:
        """As `WeightedError.rounds`: there is no product in `lift`."""
        return False

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """As `WeightedError.project`, of the identity: Y itself."""
        return rows

    def weigh_evenly(self, projected: torch.Tensor) -> torch.Tensor:
        """Y S / unit."""
        return times(projected / self.unit, self.moment)

    def lift(self, weighed: torch.Tensor, *, rounded: bool) -> torch.Tensor:
        """As `WeightedError.lift`: Y S / unit already."""
        return weighed

    def root(self) -> torch.Tensor:
        """Any R with R Rᵀ = S, float64."""
        return square_root(self.moment)


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether torch multiplies thin blocks faster in bfloat16 than in float32: on a CPU with instructions for it."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.8 cannot tell
        return False
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def _largest(tensor: torch.Tensor) -> float:
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high)) or 1.0


def _rounded_times(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``rows @ matrix.T`` of float32, rounded to bfloat16 before and after, with sums in float32."""
    narrow = rows.to(torch.bfloat16)
    room = torch.empty(min(ROUNDED_ROWS, len(matrix)), matrix.shape[1], dtype=torch.bfloat16, device=matrix.device)
    product = torch.empty(len(rows), len(matrix), device=matrix.device)
    for start in range(0, len(matrix), ROUNDED_ROWS):
        chunk = matrix[start : start + ROUNDED_ROWS]
        product[:, start : start + ROUNDED_ROWS] = narrow @ room[: len(chunk)].copy_(chunk).T
    return product


def square_root(second_moment: Moment) -> torch.Tensor:
    """Any R with R Rᵀ = C, float64: of the rows; by Cholesky where C is definite; or by eigenvectors, which is slow."""
    if isinstance(second_moment, RowMoment):
        return second_moment.root()
    moment = second_moment.to(torch.float64)
    try:
        return upper_root(moment)
    except NotDefinite:
        values, vectors = eigh(moment)
        return vectors * values.clamp_min(0).sqrt()


def weighted_energy(matrix: torch.Tensor, second_moment: torch.Tensor) -> float:
    """Return ‖matrix · C^½‖² = tr(matrix C matrixᵀ): the mean squared output of ``matrix`` on inputs of moment C.

    The product is formed in ``matrix``'s dtype; float32 gives six digits, which a report needs, at half the time.

    Args:
        matrix: out × in, float32 or float64.
        second_moment: C = E[x xᵀ], in × in, symmetric: of each pair of off-diagonal blocks one is multiplied.
    """
    in_features = second_moment.shape[0]
    width = -(-in_features // ENERGY_BLOCKS)
    energy = 0.0
    for start in range(0, in_features, width):
        columns = slice(start, start + width)
        below = second_moment[start:, columns].to(matrix.dtype, copy=True)
        below[width:] *= 2
        energy += float((matrix[:, start:] @ below).mul_(matrix[:, columns]).sum(dtype=torch.float64))
    return max(energy, 0.0)


def energy_left(
    delta: torch.Tensor, second_moment: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, energy: float
) -> float:
    """Return ‖(ΔW − B A) C^½‖² from ‖ΔW C^½‖², without another product of out × in with in × in.

    Expanded: energy − 2⟨Bᵀ ΔW, A C⟩ + ⟨Bᵀ B, A C Aᵀ⟩, in float64 since it cancels.

    Args:
        delta: ΔW, out × in.
        second_moment: C, in × in.
        lora_A: rank × in, any dtype.
        lora_B: out × rank.
        energy: ‖ΔW C^½‖².
    """
    wide_A, wide_B = lora_A.to(torch.float64), lora_B.to(torch.float64)
    weighted = times(wide_A, second_moment)
    cross = (times(wide_B.T, delta) * weighted).sum()
    square = (wide_B.T @ wide_B * (weighted @ wide_A.T)).sum()
    return max(energy - 2 * float(cross) + float(square), 0.0)
