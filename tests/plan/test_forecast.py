"""Forecasts against the definitions."""

import pytest
import torch

from gptqmodel_eora_ext.plan.forecast import ModuleMoments, forecast, with_components
from gptqmodel_eora_ext.plan.rows import moment_of
from gptqmodel_eora_ext.solve import component_gains, eora, error_loss


def moments(out: int, inner: int, tokens: int, *, weighted: bool = True, seed: int = 0) -> ModuleMoments:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, inner, generator=generator) * torch.logspace(0, -1, inner)
    pulled = torch.randn(tokens // 2, out, generator=generator) * torch.logspace(0, -1, out)
    squares = pulled.square().sum(1, keepdim=True)
    seen = rows[: len(pulled)] * squares.sqrt()
    return ModuleMoments(
        moment_of(rows, "m"),
        moment_of(pulled, "m"),
        moment_of(seen, "m", float(squares.sum())) if weighted else None,
    )


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("out", "inner", "tokens"),
    [(24, 40, 400), (24, 40, 30), (40, 64, 36), (40, 24, 400), (64, 40, 30), (300, 200, 500)],
)
def test_components_gains_and_losses_by_their_definition(out: int, inner: int, tokens: int, weighted: bool) -> None:
    """From either side of ΔW, of many tokens and of few, small and by iteration."""
    known = moments(out, inner, tokens, weighted=weighted)
    delta = torch.randn(out, inner, generator=torch.Generator().manual_seed(1))
    for rank, factors in ((16, 12), (8, 8)):
        found, lora_A, lora_B = with_components(delta, known, rank, factors)
        expected_A, expected_B = eora(delta, known.inputs, rank, exact=True)
        gains = component_gains(expected_A, expected_B, known.inputs, known.output)
        total = error_loss(delta, known.inputs, known.output)
        if known.weighted is not None:
            few = expected_B[:, :8].float() @ expected_A[:8].float()
            whole, left = (error_loss(one, known.weighted, known.output) for one in (delta, delta - few))
            first = float(gains[:8].sum())
            assert found.correction.head == pytest.approx((whole - left) / first, rel=0.02)
            assert found.correction.tail == pytest.approx(left / (total - first), rel=0.02)
            gains, total = found.correction(gains, total)
        assert found.total == pytest.approx(total, rel=1e-3)
        assert float(found.gains.sum()) == pytest.approx(float(gains.sum()), rel=0.02)
        assert lora_A.shape == (factors, inner) and lora_B.shape == (out, factors)
        torch.testing.assert_close(lora_B.T @ lora_B, torch.eye(factors), rtol=0, atol=1e-4)
        energies = [error_loss(delta - b.float() @ a.float(), known.inputs, torch.ones(out))
                    for a, b in ((lora_A, lora_B), (expected_A[:factors], expected_B[:, :factors]))]  # fmt: skip
        assert energies[0] == pytest.approx(energies[1], rel=0.02)


def test_few_tokens_give_few_components_and_gains_of_nothing_beyond() -> None:
    known = moments(24, 40, 10)
    found, lora_A, lora_B = with_components(torch.randn(24, 40), known, 20, 20)
    assert len(found.gains) == 20 and lora_A.shape == (10, 40) and lora_B.shape == (24, 10)
    assert float(found.gains[10:].abs().sum()) == 0
    assert found.left(20) == pytest.approx(0, abs=1e-3 * found.total)


def test_no_components() -> None:
    assert len(forecast(torch.randn(24, 40), moments(24, 40, 60), 0).gains) == 0
