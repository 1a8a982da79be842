"""What is done to factors before they are stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.solve import balance, energy_left, eora, refit_A, refit_B, round_to, weighted_energy

from .problems import left, problem


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_energy_left_equals_the_direct_product(dtype: torch.dtype) -> None:
    delta, second_moment = problem(30, 20, tokens=100)
    lora_A, lora_B = eora(delta, second_moment, 5)
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    direct = weighted_energy(delta - lora_B.double() @ lora_A.double(), second_moment)
    energy = weighted_energy(delta, second_moment)
    assert energy_left(delta, second_moment, lora_A, lora_B, energy) == pytest.approx(direct, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 8), seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3))
def test_property_balance_keeps_the_product(rank: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    lora_A = scale * torch.randn(rank, 11, generator=generator, dtype=torch.float64)
    lora_B = torch.randn(5, rank, generator=generator, dtype=torch.float64)
    lora_A[0] = 0
    balanced_A, balanced_B = balance(lora_A, lora_B)
    torch.testing.assert_close(balanced_B @ balanced_A, lora_B @ lora_A)
    torch.testing.assert_close(balanced_A[1:].norm(dim=1), balanced_B[:, 1:].norm(dim=0))


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 8), tokens=st.integers(1, 40), seed=st.integers(0, 999))
def test_property_a_refit_never_loses(rank: int, tokens: int, seed: int) -> None:
    delta, second_moment = problem(12, 9, tokens, seed)
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(rank, 9, generator=generator, dtype=torch.float64)
    lora_B = torch.randn(12, rank, generator=generator, dtype=torch.float64)
    before = left(delta, second_moment, (lora_A, lora_B))
    slack = 1e-9 * (before + weighted_energy(delta, second_moment))
    assert left(delta, second_moment, (lora_A, refit_B(delta, second_moment, lora_A))) <= before + slack
    assert left(delta, second_moment, (refit_A(delta, lora_B), lora_B)) <= before + slack


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_refit_absorbs_the_rounding_of_the_first_factor(dtype: torch.dtype) -> None:
    """With B rounded, the A that is refitted leaves less than the one that belonged to the B before rounding."""
    delta, second_moment = problem(30, 20, tokens=100)
    lora_A, lora_B = balance(*eora(delta, second_moment, 15))
    rounded = round_to(lora_B, dtype, "lora_B")
    least = left(delta, second_moment, (lora_A, lora_B))
    plain = left(delta, second_moment, (lora_A, rounded))
    refitted = left(delta, second_moment, (refit_A(delta, rounded), rounded))
    # The span of B moves by its rounding, so some of what rounding cost stays; most of it goes.
    assert least < refitted < least + 0.5 * (plain - least)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_to(dtype: torch.dtype) -> None:
    rounded = round_to(torch.randn(6, 2).T, dtype, "lora_A")
    assert rounded.dtype == dtype and rounded.is_contiguous()


def test_round_to_refuses_overflow() -> None:
    with pytest.raises(ValueError, match="lora_A reaches 1e\\+06"):
        round_to(torch.full((1, 2), 1e6), torch.float16, "lora_A")
