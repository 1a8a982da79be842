"""Products with a second moment."""

from __future__ import annotations

import torch

# Rows of the second moment that are widened to float64 at a time. A float64 copy of a whole 27648-wide
# moment would take 6 GB; a chunk of 4096 rows takes 0.9 GB and costs nothing measurable in speed.
CHUNK_ROWS = 4096


def times_second_moment(matrix: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """Return ``matrix @ second_moment`` in float64.

    Args:
        matrix: out × in, float64.
        second_moment: in × in, any floating dtype.
    """
    product = torch.zeros_like(matrix)
    for start in range(0, second_moment.shape[0], CHUNK_ROWS):
        stop = start + CHUNK_ROWS
        product.addmm_(matrix[:, start:stop], second_moment[start:stop].to(torch.float64))
    return product


def weighted_energy(matrix: torch.Tensor, second_moment: torch.Tensor) -> float:
    """Return ‖matrix · C^½‖² = tr(matrix C matrixᵀ): the mean squared output of ``matrix`` on inputs of moment C.

    The product is formed in ``matrix``'s dtype; float32 gives six digits, which a report needs, at half the time.

    Args:
        matrix: out × in, float32 or float64.
        second_moment: C = E[x xᵀ], in × in.
    """
    product = matrix @ second_moment.to(matrix.dtype)
    return max(float((product * matrix).sum(dtype=torch.float64)), 0.0)


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
    weighted = times_second_moment(wide_A, second_moment)
    cross = (wide_B.T @ delta.to(torch.float64) * weighted).sum()
    square = (wide_B.T @ wide_B * (weighted @ wide_A.T)).sum()
    return max(energy - 2 * float(cross) + float(square), 0.0)
