"""The algebra of a natural-gradient step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptqmodel_eora_ext.refine import RefineSettings
from gptqmodel_eora_ext.refine.natural import DAMPING, damped, natural_gradient, stepped

OUT, IN = 12, 20


def moment(features: int, seed: int) -> torch.Tensor:
    rows = torch.randn(4 * features, features, generator=torch.Generator().manual_seed(seed))
    return damped(rows.T @ rows / len(rows))


def factors(rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, IN, generator=generator), torch.randn(rank, OUT, generator=generator)


def test_damping_adds_to_the_diagonal_alone() -> None:
    plain = torch.diag(torch.tensor([1.0, 3.0]))
    assert torch.allclose(damped(plain), plain + 2 * DAMPING * torch.eye(2))
    assert float(damped(torch.zeros(2, 2)).diagonal().min()) > 0


@given(st.integers(0, 1000))
def test_natural_gradient_divides_by_both_moments(seed: int) -> None:
    gradient = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))
    outputs, inputs = moment(OUT, seed), moment(IN, seed + 1)
    found = natural_gradient(gradient, torch.linalg.cholesky(outputs), torch.linalg.cholesky(inputs))
    assert torch.allclose(outputs @ found @ inputs, gradient, atol=1e-4)


@given(st.integers(0, 1000), st.integers(1, OUT))
def test_without_a_change_factors_stay_what_they_are(seed: int, rank: int) -> None:
    down, up = factors(rank, seed)
    lora_A, lora_Bt = stepped((down, up), torch.zeros(OUT, IN), moment(IN, seed), moment(OUT, seed + 1), 16)
    assert torch.allclose(lora_Bt.T @ lora_A, up.T @ down, atol=1e-3)


@given(st.integers(0, 1000), st.integers(1, OUT - 1))
def test_the_cut_is_the_best_under_both_moments(seed: int, rank: int) -> None:
    """By the singular values of G^½ T C^½: those beyond the rank are what is left."""
    pair, change = factors(rank, seed), torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed + 2))
    inputs, outputs = moment(IN, seed), moment(OUT, seed + 1)
    lora_A, lora_Bt = stepped(pair, change, inputs, outputs, 16)
    target = pair[1].T @ pair[0] - change
    left, right = torch.linalg.cholesky(outputs.double()), torch.linalg.cholesky(inputs.double())
    rest = left.T @ (target - lora_Bt.T @ lora_A).double() @ right
    best = torch.linalg.svdvals(left.T @ target.double() @ right)[rank:]
    assert float(rest.square().sum()) <= 1.001 * float(best.square().sum()) + 1e-9


def test_a_learning_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="takes one step, whose size validation chooses"):
        RefineSettings.settle(loss="natural", learning_rate=1e-3)
    assert RefineSettings.settle(loss="natural").learning_rate is None
