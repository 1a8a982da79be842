"""Allocation under a budget, against brute force and against its own mathematics."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.solve import Curve, allocate, component_gains, eora, error_loss, price, rank_curve

from .problems import problem


def brute_force(curves: list[Curve], budget: int) -> float:
    return min(
        sum(curve.losses[i] for curve, i in zip(curves, choice, strict=True))
        for choice in itertools.product(*(range(len(curve.nbytes)) for curve in curves))
        if sum(curve.nbytes[i] for curve, i in zip(curves, choice, strict=True)) <= budget
    )


@st.composite
def knapsacks(draw: st.DrawFn) -> tuple[list[Curve], int]:
    curves = []
    for _ in range(draw(st.integers(1, 4))):
        sizes = sorted(draw(st.lists(st.integers(0, 60), min_size=1, max_size=5)))
        # Any losses, not only falling ones: rounding can make a larger rank worse.
        losses = draw(st.lists(st.floats(0, 10), min_size=len(sizes), max_size=len(sizes)))
        curves.append(Curve(tuple(sizes), tuple(losses)))
    least = sum(curve.nbytes[0] for curve in curves)
    return curves, draw(st.integers(least, least + 120))


@given(knapsacks())
@settings(deadline=None)
def test_allocation_is_optimal(knapsack: tuple[list[Curve], int]) -> None:
    curves, budget = knapsack
    chosen = allocate(curves, budget)
    assert sum(curve.nbytes[i] for curve, i in zip(curves, chosen, strict=True)) <= budget
    found = sum(curve.losses[i] for curve, i in zip(curves, chosen, strict=True))
    assert found == pytest.approx(brute_force(curves, budget), rel=1e-12, abs=1e-12)


def test_allocation_with_bytes_rounded_up_stays_within_the_budget() -> None:
    curves = [Curve((0, 999_983, 1_999_993), (3.0, 1.0, 0.0)) for _ in range(5)]
    chosen = allocate(curves, 6_000_000)
    assert sum(curve.nbytes[i] for curve, i in zip(curves, chosen, strict=True)) <= 6_000_000
    assert sum(curve.losses[i] for curve, i in zip(curves, chosen, strict=True)) <= brute_force(curves, 5_990_000)


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="budget of 9 bytes is below the 10 bytes"):
        allocate([Curve((4, 8), (1.0, 0.0)), Curve((6,), (1.0,))], 9)


@given(knapsacks())
@settings(deadline=None)
def test_choices_at_the_price_fit_and_lose_little(knapsack: tuple[list[Curve], int]) -> None:
    curves, budget = knapsack
    at = price(curves, budget)
    chosen = [curve.best_at(at) for curve in curves]
    # By Lagrange: no choice within what these spend loses less.
    spent = sum(curve.nbytes[i] for curve, i in zip(curves, chosen, strict=True))
    if at == 0 or spent <= budget:
        within = sum(curve.losses[i] for curve, i in zip(curves, chosen, strict=True))
        assert within <= brute_force(curves, spent) + 1e-9


def test_a_curve_obeys_its_cap() -> None:
    curve = Curve((0, 10, 20), (3.0, 2.0, 0.0))
    assert curve.best_at(0.0) == 2
    assert curve.best_at(0.0, most=19) == 1
    assert curve.best_at(1.0) == 0
    with pytest.raises(ValueError, match="bytes and losses alike"):
        Curve((0, 1), (1.0,))


@pytest.mark.parametrize("diagonal_moment", [False, True])
def test_gains_are_what_the_loss_falls_by(diagonal_moment: bool) -> None:
    delta, second_moment = problem(24, 40, 100)
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(200, 24, generator=generator, dtype=torch.float64)
    output_moment = gradient.T @ gradient / 200
    if diagonal_moment:
        output_moment = output_moment.diagonal().clone()
    lora_A, lora_B = eora(delta, second_moment, 10, exact=True)
    gains = component_gains(lora_A, lora_B, second_moment, output_moment)
    total = error_loss(delta, second_moment, output_moment)
    # Any set of components, not only the first ones.
    for kept in ([], [0], [1, 4, 7], list(range(10))):
        left = error_loss(delta - lora_B[:, kept] @ lora_A[kept], second_moment, output_moment)
        assert left == pytest.approx(total - float(gains[kept].sum()), rel=1e-8)


def test_rank_curve_sums_gains() -> None:
    curve = rank_curve(torch.tensor([3.0, 2.0, 1.0]), 7.0, (0, 1, 3), (0, 10, 30))
    assert curve == Curve((0, 10, 30), (7.0, 4.0, 1.0))
