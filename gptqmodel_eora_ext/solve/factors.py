"""What is done to factors before they are stored: balance, rounding, and the re-solve that absorbs a rounding."""

from __future__ import annotations

import torch

from .decompositions import eigh
from .error import WeightedError
from .moments import Moment, times

# Below this share of the largest eigenvalue a direction counts as one that the other factor does not reach: float64
# rounding makes eigenvalues of 1e-16 of the largest where there is nothing.
REFIT_CUTOFF = 1e-13


def balance(lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale each component so that its row of A and its column of B have the same norm; B A is unchanged.

    EoRA's B is orthonormal while A carries all magnitude; balanced, both halves keep their digits in float16.

    Args:
        lora_A: rank × in.
        lora_B: out × rank.
    """
    norm_a = lora_A.norm(dim=1)
    norm_b = lora_B.norm(dim=0)
    live = (norm_a > 0) & (norm_b > 0)
    scale = torch.where(live, (norm_b / norm_a.clamp_min(torch.finfo(norm_a.dtype).tiny)).sqrt(), norm_a.new_ones(()))
    return lora_A * scale[:, None], lora_B / scale[None, :]


def balance_together(lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale all components alike, so that A and B have the same norm; B A is unchanged.

    Where components share a scale in B (`FactorLayout.along_rank`), its columns should stay of one size.

    Args:
        lora_A: rank × in.
        lora_B: out × rank.
    """
    norm_a, norm_b = lora_A.norm(), lora_B.norm()
    scale = (norm_b / norm_a).sqrt() if bool(norm_a > 0) and bool(norm_b > 0) else norm_a.new_ones(())
    return lora_A * scale, lora_B / scale


def refit_A(delta: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    """The A that is best beside a given B: (Bᵀ B)⁺ Bᵀ ΔW. It is the same under every second moment.

    Args:
        delta: ΔW, out × in.
        lora_B: out × rank, for instance as rounded for storage.

    Returns:
        rank × in, float64.
    """
    wide = lora_B.to(torch.float64)
    return _solve_symmetric(wide.T @ wide, times(wide.T, delta))


def refit_B(delta: torch.Tensor, second_moment: Moment | None, lora_A: torch.Tensor) -> torch.Tensor:
    """The B that is best beside a given A under C: ΔW C Aᵀ (A C Aᵀ)⁺.

    Args:
        delta: ΔW, out × in.
        second_moment: C, in × in, its diagonal, the rows that it is of, or None for the identity.
        lora_A: rank × in, for instance as rounded for storage.

    Returns:
        out × rank, float64.
    """
    return NormalEquations(WeightedError(delta, second_moment), lora_A.to(torch.float64)).solution()


class NormalEquations:
    """What B beside a given A is solved from, and told the error of: A C Aᵀ and A C ΔWᵀ.

    Args:
        error: ΔW and C.
        lora_A: rank × in, float64.

    Attributes:
        gram: A C Aᵀ, rank × rank.
        cross: A C ΔWᵀ, rank × out.
    """

    def __init__(self, error: WeightedError, lora_A: torch.Tensor) -> None:
        weighted = error.weigh(lora_A)
        self.gram = weighted @ lora_A.T
        self.cross = times(weighted, error.delta.T)

    def solution(self) -> torch.Tensor:
        """The best B: ΔW C Aᵀ (A C Aᵀ)⁺, out × rank."""
        return _solve_symmetric(self.gram, self.cross).T

    def relative_energy(self, lora_B: torch.Tensor) -> float:
        """‖(ΔW − B A) C^½‖² − ‖ΔW C^½‖² of any B, out × rank, float64."""
        return float((lora_B.T @ lora_B * self.gram).sum() - 2 * (lora_B * self.cross.T).sum())


def _solve_symmetric(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``matrix⁺ right`` for a small positive semidefinite matrix, float64."""
    diagonal = matrix.diagonal()
    # A row of zeros has no scale: the noise of the eigenvectors would be multiplied by it. B has a column of zeros
    # where components share a scale in it and one of them is too small for that.
    scale = torch.where(diagonal > 0, diagonal.clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt(), 0)
    values, vectors = eigh(matrix * scale[:, None] * scale[None, :])
    inverse = torch.where(values > REFIT_CUTOFF * values[-1].clamp_min(0), 1 / values, torch.zeros_like(values))
    return scale[:, None] * (vectors @ (inverse[:, None] * (vectors.T @ (scale[:, None] * right))))


def round_to(factor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return a contiguous copy in ``dtype``.

    Raises:
        ValueError: when a value does not fit the dtype (float16 ends at 65504).
    """
    limit = torch.finfo(dtype).max
    largest = float(factor.abs().max()) if factor.numel() else 0.0
    if largest > limit:
        raise ValueError(f"{name} reaches {largest:.3g}, above the largest {dtype} ({limit:.3g}).")
    return factor.to(dtype).contiguous()
