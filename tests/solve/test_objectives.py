"""Every objective against its optimum in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.solve import diagonal, eora, error, output, svd, weighted_energy

from .problems import left, optimum, problem, rotated_spectrum, with_outliers

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (13, 31), (31, 13), (64, 48), (96, 17)]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 1000])
def test_eora_reaches_the_optimum(shape: tuple[int, int], rank: int, exact: bool) -> None:
    delta, second_moment = problem(*shape, tokens=200)
    best = optimum(delta, second_moment, min(rank, *shape))
    total = weighted_energy(delta, second_moment)
    found = eora(delta, second_moment, rank, exact=exact)
    assert left(delta, second_moment, found) <= best * (1 + 1e-9) + total * 1e-12


def test_svd_and_diagonal_reach_theirs() -> None:
    delta, second_moment = problem(40, 30, tokens=200)
    identity = torch.eye(30, dtype=torch.float64)
    assert left(delta, identity, svd(delta, 6)) == pytest.approx(optimum(delta, identity, 6), rel=1e-9)
    channels = torch.diag(second_moment.diagonal())
    for given_as in (second_moment, second_moment.diagonal()):
        found = left(delta, channels, diagonal(delta, given_as, 6))
        assert found == pytest.approx(optimum(delta, channels, 6), rel=1e-9)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("output_rank", [24, 10])
def test_two_sided_weighting(shape: tuple[int, int], output_rank: int) -> None:
    delta, second_moment = problem(*shape, tokens=100)
    gradients = torch.randn(output_rank, shape[0], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    output_moment = gradients.T @ gradients / output_rank
    values, vectors = torch.linalg.eigh(output_moment)
    root = (vectors * values.clamp_min(0).sqrt()).T
    lora_A, lora_B = eora(delta, second_moment, 5, output_moment=output_moment)
    assert torch.isfinite(lora_B).all()
    found = weighted_energy(root @ (delta - lora_B @ lora_A), second_moment)
    assert found == pytest.approx(optimum(root @ delta, second_moment, 5), rel=1e-8)


def test_output_follows_the_full_precision_output() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(300, 20, generator=generator, dtype=torch.float64)
    seen = clean + 0.2 * torch.randn(300, 20, generator=generator, dtype=torch.float64)
    weight = torch.randn(16, 20, generator=generator, dtype=torch.float64)
    quantized = weight + 0.1 * torch.randn(16, 20, generator=generator, dtype=torch.float64)
    second_moment, cross_moment = seen.T @ seen / 300, clean.T @ seen / 300

    def distance(lora_A: torch.Tensor, lora_B: torch.Tensor) -> float:
        return float((clean @ weight.T - seen @ (quantized + lora_B @ lora_A).T).square().sum())

    undamped = output(weight, quantized, second_moment, cross_moment, 4, damping=1.0)
    assert distance(*undamped) < distance(*eora(weight - quantized, second_moment, 4))
    same = output(weight, quantized, second_moment, cross_moment, 4, damping=0.0)
    torch.testing.assert_close(same[1] @ same[0], torch.matmul(*eora(weight - quantized, second_moment, 4)[::-1]))
    # With the same inputs on both sides there is nothing to follow.
    equal = output(weight, quantized, second_moment, second_moment, 4)
    torch.testing.assert_close(equal[1] @ equal[0], same[1] @ same[0])


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_rank_deficient_second_moment(shape: tuple[int, int], tokens: int) -> None:
    delta, second_moment = problem(*shape, tokens=tokens)
    lora_A, lora_B = eora(delta, second_moment, rank=8)
    assert torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()
    # Rank 8 covers every direction that fewer tokens span.
    assert left(delta, second_moment, (lora_A, lora_B)) <= 1e-9 * max(weighted_energy(delta, second_moment), 1)


@pytest.mark.parametrize("shape", [(400, 500), (500, 400), (400, 400)])
@pytest.mark.parametrize("rank", [1, 16, 40, 90])
@pytest.mark.parametrize("spectrum", ["decaying", "flat", "condition 1e12", "outliers 1e3", "outliers 1e6"])
def test_iterated_solution_is_within_a_thousandth(shape: tuple[int, int], rank: int, spectrum: str) -> None:
    """Sides large beside the rank are iterated; a flat spectrum converges slowest, outliers need float64."""
    delta, second_moment = problem(*shape, tokens=1000)
    delta = delta.float()
    if spectrum == "flat":
        second_moment = torch.eye(shape[1], dtype=torch.float64)
    elif spectrum == "condition 1e12":
        second_moment = rotated_spectrum(torch.logspace(0, -12, shape[1], dtype=torch.float64))
    elif spectrum.startswith("outliers"):
        second_moment = with_outliers(second_moment, float(spectrum.split()[1]))
    # Float64 itself resolves the energy left to 1e-15 of the whole.
    floor = 1e-14 * weighted_energy(delta.double(), second_moment)
    best = optimum(delta, second_moment, rank)
    assert left(delta, second_moment, eora(delta, second_moment, rank)) <= 1.001 * best + floor


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("spectrum", ["decaying", "flat", "condition 1e12", "outliers 30"])
def test_directions_may_be_proposed_in_bfloat16(monkeypatch: pytest.MonkeyPatch, spectrum: str, rounded: bool) -> None:
    """Which a device does or does not; outliers of this size are iterated in float32."""
    monkeypatch.setattr(error, "multiplies_bfloat16", lambda device: rounded)
    delta, second_moment = problem(300, 500, tokens=1000)
    if spectrum == "flat":
        second_moment = torch.eye(500, dtype=torch.float64)
    elif spectrum == "condition 1e12":
        second_moment = rotated_spectrum(torch.logspace(0, -12, 500, dtype=torch.float64))
    elif spectrum.startswith("outliers"):
        second_moment = with_outliers(second_moment, float(spectrum.split()[1]))
    delta = delta.float()
    found = left(delta, second_moment, eora(delta, second_moment, 16))
    assert found <= 1.001 * optimum(delta, second_moment, 16)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_scale_does_not_matter(scale: float) -> None:
    delta, second_moment = problem(400, 300, tokens=600)
    delta, second_moment = delta.float(), (second_moment * scale).float()
    found = left(delta, second_moment, eora(delta, second_moment, 8))
    assert found <= 1.001 * optimum(delta, second_moment, 8)


def test_a_seed_repeats_to_the_last_bit() -> None:
    delta, second_moment = problem(300, 400, tokens=600)
    delta = delta.float()
    first, again = (eora(delta, second_moment, 8, seed=5) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    other = eora(delta, second_moment, 8, seed=6)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_errors_are_widened(dtype: torch.dtype) -> None:
    delta, second_moment = problem(30, 20, tokens=100)
    lora_A, lora_B = eora(delta.to(dtype), second_moment.float(), 4)
    assert lora_A.shape == (4, 20) and lora_B.shape == (30, 4)
    found = left(delta.to(dtype), second_moment, (lora_A, lora_B))
    assert found <= 1.001 * optimum(delta.to(dtype), second_moment, 4)


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


@pytest.mark.parametrize("shape", [(6, 9), (300, 400)])
def test_zero_error_and_zero_moment(shape: tuple[int, int]) -> None:
    delta, second_moment = problem(*shape, tokens=50)
    lora_A, lora_B = eora(torch.zeros(shape), second_moment, rank=2)
    assert not (lora_B @ lora_A).any()
    lora_A, lora_B = eora(delta.float(), torch.zeros_like(second_moment), rank=2)
    assert torch.isfinite(lora_B @ lora_A).all()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"second_moment \(3, 3\) and delta \(4, 5\)"):
        eora(torch.zeros(4, 5), torch.zeros(3, 3), 1)
    with pytest.raises(ValueError, match=r"output_moment \(3, 3\) and delta \(4, 5\)"):
        eora(torch.zeros(4, 5), torch.zeros(5, 5), 1, output_moment=torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"cross_moment \(4, 4\) and second_moment \(5, 5\)"):
        output(torch.zeros(4, 5), torch.zeros(4, 5), torch.zeros(5, 5), torch.zeros(4, 4), 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        svd(torch.zeros(4, 5), 0)
    with pytest.raises(ValueError, match=r"got \(0, 5\)"):
        svd(torch.zeros(0, 5), 1)
    with pytest.raises(ValueError, match="`delta` holds NaN or infinity in 20 of 20"):
        svd(torch.full((4, 5), torch.nan), 1)
    with pytest.raises(ValueError, match="`second_moment` holds NaN or infinity in 1 of 25"):
        broken = torch.zeros(5, 5)
        broken[2, 3] = torch.inf
        eora(torch.zeros(4, 5), broken, 1)


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
