"""Errors, second moments, and the optimum that solvers are held against."""

from __future__ import annotations

import torch

from gptqmodel_eora_ext.solve import weighted_energy


def problem(out_features: int, in_features: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gaussian ΔW, and C of inputs whose channels span two decades; float64."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, in_features, generator=generator, dtype=torch.float64)
    inputs *= torch.logspace(0, 2, in_features, dtype=torch.float64)
    return delta, inputs.T @ inputs / max(tokens, 1)


def rotated_spectrum(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A second moment with these eigenvalues and random eigenvectors; float64."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(square).Q
    moment = (vectors * values) @ vectors.T
    return (moment + moment.T) / 2


def with_outliers(second_moment: torch.Tensor, size: float, channels: int = 3) -> torch.Tensor:
    """The second moment of inputs whose first channels are ``size`` times larger."""
    scale = torch.ones(second_moment.shape[0], dtype=second_moment.dtype)
    scale[:channels] = size
    return scale[:, None] * second_moment * scale[None, :]


def optimum(delta: torch.Tensor, second_moment: torch.Tensor, rank: int) -> float:
    """Energy left by the best rank-r correction: the tail of the singular values of ΔW C^½."""
    values, vectors = torch.linalg.eigh(second_moment.double())
    root = vectors * values.clamp_min(0).sqrt()
    return float(torch.linalg.svdvals(delta.double() @ root)[rank:].square().sum())


def left(delta: torch.Tensor, second_moment: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Energy left by these factors, by the direct product."""
    lora_A, lora_B = factors
    return weighted_energy(delta.double() - lora_B.double() @ lora_A.double(), second_moment.double())
