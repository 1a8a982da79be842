"""EoRA's optimum, against a whitened SVD in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.solve import (
    balance,
    energy_left,
    eora,
    eora_with_energy,
    round_to,
    weighted_energy,
)

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (13, 31), (31, 13), (64, 48), (96, 17)]


def problem(out_features: int, in_features: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, in_features, generator=generator, dtype=torch.float64)
    inputs *= torch.logspace(0, 2, in_features, dtype=torch.float64)
    return delta, inputs.T @ inputs / max(tokens, 1)


def optimum(delta: torch.Tensor, second_moment: torch.Tensor, rank: int) -> float:
    """Energy left by the best rank-r correction: the tail of the singular values of ΔW C^½."""
    values, vectors = torch.linalg.eigh(second_moment)
    root = vectors * values.clamp_min(0).sqrt()
    return float(torch.linalg.svdvals(delta @ root)[rank:].square().sum())


def left(delta: torch.Tensor, second_moment: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]) -> float:
    lora_A, lora_B = factors
    return weighted_energy(delta - lora_B @ lora_A, second_moment)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 1000])
def test_reaches_the_optimum(shape: tuple[int, int], rank: int) -> None:
    delta, second_moment = problem(*shape, tokens=200)
    best = optimum(delta, second_moment, min(rank, *shape))
    total = weighted_energy(delta, second_moment)
    assert left(delta, second_moment, eora(delta, second_moment, rank)) <= best * (1 + 1e-9) + total * 1e-12


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_rank_deficient_second_moment(shape: tuple[int, int], tokens: int) -> None:
    delta, second_moment = problem(*shape, tokens=tokens)
    lora_A, lora_B = eora(delta, second_moment, rank=8)
    assert torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()
    # Rank 8 covers every direction that fewer tokens span.
    assert left(delta, second_moment, (lora_A, lora_B)) <= 1e-9 * max(weighted_energy(delta, second_moment), 1)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_outlier_channels_do_not_hide_the_rest(shape: tuple[int, int]) -> None:
    delta, second_moment = problem(*shape, tokens=500)
    outliers = torch.ones(shape[1], dtype=torch.float64)
    outliers[:3] = 1000
    second_moment = outliers[:, None] * second_moment * outliers[None, :]
    found = left(delta, second_moment, eora(delta, second_moment, rank=10))
    assert found <= 1.001 * optimum(delta, second_moment, 10)


@pytest.mark.parametrize("shape", [(400, 500), (500, 400), (400, 400)])
@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize("flat", [False, True])
def test_iterated_solution_is_within_a_thousandth(shape: tuple[int, int], rank: int, flat: bool) -> None:
    """Sides large beside the rank are iterated; a flat spectrum is the hard case."""
    delta, second_moment = problem(*shape, tokens=1000)
    if flat:
        second_moment = torch.eye(shape[1], dtype=torch.float64)
    factors = eora(delta, second_moment, rank)
    assert left(delta, second_moment, factors) <= 1.001 * optimum(delta, second_moment, rank)
    again = eora(delta, second_moment, rank)
    assert torch.equal(factors[0], again[0]) and torch.equal(factors[1], again[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_energy_left_equals_the_direct_product(dtype: torch.dtype) -> None:
    delta, second_moment = problem(30, 20, tokens=100)
    lora_A, lora_B, energy = eora_with_energy(delta, second_moment, 5)
    assert energy == pytest.approx(weighted_energy(delta, second_moment), rel=1e-12)
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    direct = weighted_energy(delta - lora_B.double() @ lora_A.double(), second_moment)
    assert energy_left(delta, second_moment, lora_A, lora_B, energy) == pytest.approx(direct, rel=1e-9)


def test_components_come_in_order_of_energy() -> None:
    delta, second_moment = problem(20, 30, tokens=100)
    lora_A, lora_B = eora(delta, second_moment, rank=6)
    for rank in range(1, 6):
        cut = left(delta, second_moment, (lora_A[:rank], lora_B[:, :rank]))
        assert cut == pytest.approx(optimum(delta, second_moment, rank), rel=1e-9)


def test_slightly_indefinite_second_moment() -> None:
    delta, second_moment = problem(9, 14, tokens=4)
    second_moment = second_moment - 1e-9 * second_moment.diagonal().max() * torch.eye(14, dtype=torch.float64)
    for matrix in (delta, delta.T @ delta @ second_moment):
        lora_A, lora_B = eora(matrix, second_moment, rank=3)
        assert torch.isfinite(lora_B @ lora_A).all()


def test_zero_error_gives_zero_correction() -> None:
    _, second_moment = problem(6, 9, tokens=50)
    lora_A, lora_B = eora(torch.zeros(6, 9), second_moment, rank=2)
    assert not (lora_B @ lora_A).any()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"second_moment \(3, 3\) and delta \(4, 5\)"):
        eora(torch.zeros(4, 5), torch.zeros(3, 3), 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        eora(torch.zeros(4, 5), torch.zeros(5, 5), 0)
    with pytest.raises(ValueError, match="`delta` holds NaN"):
        eora(torch.full((4, 5), torch.nan), torch.zeros(5, 5), 1)
    with pytest.raises(ValueError, match="`second_moment` holds NaN"):
        eora(torch.zeros(4, 5), torch.full((5, 5), torch.inf), 1)


@settings(max_examples=40, deadline=None)
@given(
    out_features=st.integers(1, 24),
    in_features=st.integers(1, 24),
    tokens=st.integers(0, 40),
    rank=st.integers(1, 24),
    seed=st.integers(0, 999),
)
def test_property_never_worse_than_nothing_and_optimal(
    out_features: int, in_features: int, tokens: int, rank: int, seed: int
) -> None:
    delta, second_moment = problem(out_features, in_features, tokens, seed)
    total = weighted_energy(delta, second_moment)
    found = left(delta, second_moment, eora(delta, second_moment, rank))
    best = optimum(delta, second_moment, min(rank, out_features, in_features))
    assert best - 1e-9 * total <= found <= best + 1e-9 * total + 1e-12


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_to(dtype: torch.dtype) -> None:
    lora_A, lora_B = round_to(torch.randn(2, 6).T.contiguous().T, torch.randn(4, 2), dtype)
    assert lora_A.dtype == lora_B.dtype == dtype and lora_A.is_contiguous()


def test_round_to_refuses_overflow() -> None:
    with pytest.raises(ValueError, match="lora_A reaches 1e\\+06"):
        round_to(torch.full((1, 2), 1e6), torch.zeros(2, 1), torch.float16)
