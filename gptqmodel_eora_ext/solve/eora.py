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

# Extra columns of the iterated block; the error of the r-th component falls by (λ_{r+32} / λ_r)² a sweep.
OVERSAMPLING = 32
# Below this many blocks a full eigendecomposition is as fast: 576 × 576, rank 32, is 5 blocks and takes a third.
EXACT_BELOW = 4
# A sweep that lowers the weighted error by less than this share is the last; what is left to win is of that order.
TOLERANCE = 1e-4
# Real errors take 3 to 8. Past this many, the full eigendecomposition has become the faster way.
MAX_SWEEPS = 24
# Runs repeat to the last bit.
SEED = 0


def eora(delta: torch.Tensor, second_moment: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors A, B that minimise ‖(ΔW − B A) C^½‖.

    The eigenproblem is solved in float64 on the smaller side of ΔW: exactly where that side is small beside the rank,
    else by subspace iteration to a weighted error within 1.001 of the optimum.

    Args:
        delta: ΔW = W − Ŵ, out × in, any floating dtype.
        second_moment: C = E[x xᵀ], in × in, symmetric; indefinite by rounding is accepted.
        rank: number of components, at least 1. Above min(out, in) it is cut to that.

    Returns:
        A (rank × in) and B (out × rank), float64, components in order of decreasing weighted energy.

    Raises:
        ValueError: on shapes that do not fit, a rank below 1, or non-finite input.
    """
    lora_A, lora_B, _ = eora_with_energy(delta, second_moment, rank)
    return lora_A, lora_B


def eora_with_energy(
    delta: torch.Tensor, second_moment: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """As `eora`, and the weighted energy ‖ΔW C^½‖² of the error before correction, a by-product."""
    _check(delta, second_moment, rank)
    delta = delta.to(torch.float64)
    out_features, in_features = delta.shape
    rank = min(rank, out_features, in_features)
    if out_features <= in_features:
        gram = times_second_moment(delta, second_moment) @ delta.T
        basis = _top_eigenvectors(gram, rank)
    else:
        image = delta @ _root(second_moment.to(torch.float64))
        gram = image.T @ image
        # The Gram matrix squares the condition number; QR of the image restores orthonormal columns, and fills
        # directions of no energy (C of lower rank than asked) with arbitrary ones that A then weighs by Uᵀ ΔW.
        basis = torch.linalg.qr(image @ _top_eigenvectors(gram, rank)).Q
    return basis.T @ delta, basis, max(float(gram.trace()), 0.0)


def _root(second_moment: torch.Tensor) -> torch.Tensor:
    """Any L with L Lᵀ = C: Cholesky's where C is definite, in a tenth of the time, else the eigenvectors'."""
    lower, failed = torch.linalg.cholesky_ex(second_moment)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(second_moment)
    return vectors * values.clamp_min(0).sqrt()


def _top_eigenvectors(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal eigenvectors of the largest eigenvalues of a positive semidefinite matrix, largest first."""
    symmetric = (gram + gram.T) / 2
    block = rank + OVERSAMPLING
    if symmetric.shape[0] > EXACT_BELOW * block:
        found = _subspace_iteration(symmetric, rank, block)
        if found is not None:
            return found
    return torch.linalg.eigh(symmetric).eigenvectors[:, -rank:].flip(1)


def _subspace_iteration(gram: torch.Tensor, rank: int, block: int) -> torch.Tensor | None:
    """Block power iteration with Rayleigh-Ritz, until the weighted error stops falling; None if it does not stop.

    The weighted error left by the top Ritz vectors is tr(gram) minus their Ritz values, so the test is on the very
    quantity that counts, not on the vectors, which for close eigenvalues never settle and need not.
    """
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(gram.shape[0], block, generator=generator, dtype=gram.dtype).to(gram.device)
    basis = torch.linalg.qr(gram @ start).Q
    total, left = float(gram.trace()), float("inf")
    for _ in range(MAX_SWEEPS):
        image = gram @ basis
        values, rotation = torch.linalg.eigh(basis.T @ image)
        previous, left = left, total - float(values[-rank:].sum())
        if previous - left <= TOLERANCE * abs(left):
            return basis @ rotation[:, -rank:].flip(1)
        basis = torch.linalg.qr(image).Q
    return None


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
