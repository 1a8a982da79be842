"""EoRA: the best low-rank correction of a weight error under the second moment of the inputs.

    minimise over A, B     ‖(ΔW − B A) C^½‖      C = E[x xᵀ]

Source: EoRA, arXiv 2410.21271, which whitens with the eigenvectors of C, takes an SVD, and maps back with Λ^−½.
The form used here needs no inverse: with U the top-r eigenvectors of ΔW C ΔWᵀ, the optimum is B = U, A = Uᵀ ΔW,
since U Uᵀ ΔW C^½ is the best rank-r approximation of ΔW C^½ (Eckart-Young). A rank-deficient C (fewer tokens than
channels, dead channels, an expert that saw few tokens) is therefore harmless.
"""

from __future__ import annotations

import torch

from .metric import times_second_moment


def eora(delta: torch.Tensor, second_moment: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors A, B that minimise ‖(ΔW − B A) C^½‖.

    The eigenproblem is solved exactly, in float64, on the smaller side of ΔW.

    Args:
        delta: ΔW = W − Ŵ, out × in, any floating dtype.
        second_moment: C = E[x xᵀ], in × in, symmetric; indefinite by rounding is accepted.
        rank: number of components, at least 1. Above min(out, in) it is cut to that.

    Returns:
        A (rank × in) and B (out × rank), float64, components in order of decreasing weighted energy.

    Raises:
        ValueError: on shapes that do not fit, a rank below 1, or non-finite input.
    """
    _check(delta, second_moment, rank)
    delta = delta.to(torch.float64)
    out_features, in_features = delta.shape
    rank = min(rank, out_features, in_features)
    if out_features <= in_features:
        gram = times_second_moment(delta, second_moment) @ delta.T
        basis = _top_eigenvectors(gram, rank)
    else:
        basis = _basis_from_input_side(delta, second_moment, rank)
    return basis.T @ delta, basis


def _top_eigenvectors(gram: torch.Tensor, rank: int) -> torch.Tensor:
    symmetric = (gram + gram.T) / 2
    return torch.linalg.eigh(symmetric).eigenvectors[:, -rank:].flip(1)


def _basis_from_input_side(delta: torch.Tensor, second_moment: torch.Tensor, rank: int) -> torch.Tensor:
    """Left singular vectors of ΔW C^½ by its in × in Gram matrix, for ΔW taller than wide."""
    values, vectors = torch.linalg.eigh(second_moment.to(torch.float64))
    image = delta @ (vectors * values.clamp_min(0).sqrt())
    right = _top_eigenvectors(image.T @ image, rank)
    # The Gram matrix squares the condition number; QR of the image restores orthonormal columns, and fills
    # directions of no energy (C of lower rank than asked) with arbitrary ones that A then weighs by Uᵀ ΔW.
    return torch.linalg.qr(image @ right).Q


def _check(delta: torch.Tensor, second_moment: torch.Tensor, rank: int) -> None:
    if delta.ndim != 2 or second_moment.shape != (delta.shape[1], delta.shape[1]):
        raise ValueError(
            f"eora: `second_moment` must be in_features × in_features for `delta` out_features × in_features, "
            f"got second_moment {tuple(second_moment.shape)} and delta {tuple(delta.shape)}."
        )
    if rank < 1:
        raise ValueError(f"eora: `rank` must be at least 1, got {rank}.")
    for name, tensor in (("delta", delta), ("second_moment", second_moment)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"eora: `{name}` holds NaN or infinity.")
