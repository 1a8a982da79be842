"""Steps of the factors: orthogonal, and as long in the outputs for an input of any size."""

from __future__ import annotations

import math

import pytest
import torch

from gptqmodel_eora_ext.refine.factors import TrainedFactors
from gptqmodel_eora_ext.refine.muon import Muon, orthogonal, rate_of

RANK, FEATURES, RATE = 6, (96, 70), 0.01


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def factors() -> TrainedFactors:
    pairs = {name: (draw(RANK, FEATURES[0], seed=seed), draw(RANK, FEATURES[1], seed=seed + 1))
             for seed, name in enumerate("ab")}  # fmt: skip
    return TrainedFactors(pairs, bits=16, stored_as=torch.float16, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(1, 40), (6, 96), (20, 20), (30, 8)])
def test_singular_values_become_one(shape: tuple[int, int]) -> None:
    matrix = draw(*shape)
    found = orthogonal(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linalg.svdvals(found)[: min(shape)]
    assert values.min() > 0.6 and values.max() < 1.25
    # Singular vectors stay as they are.
    inside = left.T @ found @ right.T
    assert torch.allclose(inside, torch.diag(inside.diagonal()), atol=1e-4) and (inside.diagonal() > 0).all()
    assert torch.allclose(orthogonal(1e-6 * matrix), found, atol=1e-3)


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not orthogonal(torch.zeros(3, 5)).any()


def test_a_value_moves_by_about_the_rate_and_down(factors: TrainedFactors) -> None:
    before = factors.master.clone()
    for gradient in factors.split(factors.gradient):
        gradient.copy_(1e-5 * draw(*gradient.shape, seed=7))
    given = factors.gradient.clone()
    Muon(factors).step(RATE)
    for moved, gradient in zip(factors.split(before - factors.master), factors.split(given), strict=True):
        # As far in all for any rank, so each value farther than at rank 16.
        size = float(moved.square().mean().sqrt()) * math.sqrt(RANK / 16)
        assert 0.6 * RATE < size < 1.4 * RATE
        assert float((moved * gradient).sum()) > 0
    assert not factors.gradient.any()
    # What fills a row up to whole groups stays zero.
    assert not (before - factors.master)[-RANK * 2 :].view(RANK, -1)[:, FEATURES[1] :].any()


def test_an_input_of_any_size_moves_the_output_by_as_much(factors: TrainedFactors) -> None:
    """The gradient of a column is as large as its input, so 30 times as large an input is to move by a thirtieth."""
    large = 30.0
    for seed, gradient in enumerate(factors.split(factors.gradient)):
        gradient.copy_(draw(*gradient.shape, seed=seed))
        gradient[:, 3] *= large
    before = factors.master.clone()
    Muon(factors).step(RATE)
    for moved in list(factors.split(before - factors.master))[::2]:
        sizes = moved.square().mean(0).sqrt()
        assert sizes[3] == pytest.approx(float(sizes[4:].mean()) / large, rel=0.7)


def test_what_no_token_reached_stays(factors: TrainedFactors) -> None:
    """Though a mean of earlier gradients is left."""
    muon = Muon(factors)
    for gradient in factors.split(factors.gradient):
        gradient.copy_(draw(*gradient.shape))
    muon.step(RATE)
    before, mean, columns = factors.master.clone(), muon.mean.clone(), muon.columns.clone()
    first, *others = factors.split(factors.gradient)
    first.copy_(draw(*first.shape, seed=1))
    muon.step(RATE)
    moved = [bool(one.any()) for one in factors.split(before - factors.master)]
    assert moved == [True] + [False] * len(others)
    remembered = [not torch.equal(*pair) for pair in zip(*map(factors.split, (mean, muon.mean)), strict=True)]
    assert remembered == moved
    assert torch.equal(columns[FEATURES[0] :], muon.columns[FEATURES[0] :])


def test_steps_are_the_same_for_a_gradient_of_any_size(factors: TrainedFactors) -> None:
    """Losses differ in size, and so do modules."""
    found = []
    for size in (1e-6, 1.0):
        other = TrainedFactors({"a": (draw(RANK, 96), draw(RANK, 70))}, bits=16, stored_as=torch.float16,
                               dtype=torch.float32)  # fmt: skip
        muon = Muon(other)
        for step in range(3):
            for gradient in other.split(other.gradient):
                gradient.copy_(size * draw(*gradient.shape, seed=step))
            muon.step(RATE)
        found.append(other.master)
    assert torch.allclose(*found, atol=1e-5)


def test_the_rate_falls_to_zero() -> None:
    assert [rate_of(2.0, step, 4) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]
