"""Moments kept as rows give what the matrices give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.solve import (
    Grid,
    RowMoment,
    column_order,
    component_gains,
    eora,
    error_loss,
    gptq,
    output_error,
    output_gains,
    output_loss,
)

SIZES = st.integers(2, 24)


def rows_of(count: int, features: int, seed: int) -> RowMoment:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, features, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, features)
    return RowMoment(rows, 1.5 * count)


def dense(moment: RowMoment) -> torch.Tensor:
    return moment.rows.T @ moment.rows / moment.count


@settings(deadline=None, max_examples=40)
@given(SIZES, SIZES, st.integers(1, 30), st.integers(1, 30), st.integers(0, 100))
def test_losses_and_gains_are_those_of_the_matrices(out: int, inner: int, seen: int, pulled: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(out, inner, generator=generator, dtype=torch.float64)
    C, G = rows_of(seen, inner, seed), rows_of(pulled, out, seed + 2)
    lora_A, lora_B = eora(delta, C, min(3, out, inner), exact=True)
    for first in (C, dense(C)):
        for second in (G, dense(G)):
            torch.testing.assert_close(
                component_gains(lora_A, lora_B, first, second), component_gains(lora_A, lora_B, dense(C), dense(G))
            )
            assert error_loss(delta, first, second) == pytest.approx(error_loss(delta, dense(C), dense(G)), rel=1e-9)
            error = output_error(delta, first)
            torch.testing.assert_close(error, delta @ dense(C) @ delta.T)
            assert output_loss(error, second) == pytest.approx(error_loss(delta, dense(C), dense(G)), rel=1e-6)
            torch.testing.assert_close(
                output_gains(lora_B, error, second), component_gains(lora_A, lora_B, dense(C), dense(G))
            )


@pytest.mark.parametrize(("out", "inner", "seen", "rank"), [(40, 60, 30, 8), (300, 400, 120, 8), (60, 30, 20, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_components_are_those_of_the_matrix(out: int, inner: int, seen: int, rank: int, dtype: torch.dtype) -> None:
    """Small and by a full decomposition, large and by iteration, and taller than wide."""
    generator = torch.Generator().manual_seed(0)
    delta, C = torch.randn(out, inner, generator=generator).to(dtype), rows_of(seen, inner, 1)
    best, found = (eora(delta, moment, rank) for moment in (dense(C), C))

    def left(factors: tuple[torch.Tensor, torch.Tensor]) -> float:
        return error_loss(delta.double() - factors[1].double() @ factors[0].double(), C, torch.ones(out))

    assert left(found) == pytest.approx(left(best), rel=2e-3, abs=1e-9 * error_loss(delta.double(), C, torch.ones(out)))


def test_no_more_components_than_rows() -> None:
    lora_A, lora_B = eora(torch.ones(8, 9), RowMoment(torch.randn(3, 9), 3), 5)
    assert lora_A.shape == (3, 9) and lora_B.shape == (8, 3)
    assert torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()


def test_quick_gptq_rounds_alike() -> None:
    C = rows_of(20, 48, 3)
    C = RowMoment(C.rows.float(), C.count)
    first, second = (column_order(moment, 16) for moment in (C, C.dense()))
    assert torch.equal(first.order, second.order)
    torch.testing.assert_close(first.factor, second.factor, rtol=1e-4, atol=1e-5)
    weight = torch.randn(12, 48, generator=torch.Generator().manual_seed(4))
    rounded = (gptq(weight, columns, [3], Grid(16))[0] for columns in (first, second))
    errors = [error_loss(weight - one, C, torch.ones(12)) for one in rounded]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


def test_bfloat16_rows_and_the_device_are_kept() -> None:
    moment = RowMoment(torch.randn(4, 6).to(torch.bfloat16), 4)
    vectors = torch.randn(2, 6, dtype=torch.float64)
    wide = moment.rows.double()
    torch.testing.assert_close(moment.weigh(vectors), vectors @ wide.T @ wide / 4)
    torch.testing.assert_close(moment.dense(), (wide.T @ wide / 4).float())
    assert moment.to("cpu").rows.dtype == torch.bfloat16 and moment.shape == (6, 6)
