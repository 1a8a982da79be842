"""Forecasts from output errors and from inputs are the same."""

import pytest
import torch

from gptqmodel_eora_ext.plan.forecast import ModuleMoments, _by_inputs, _by_outputs, forecast, with_components
from gptqmodel_eora_ext.plan.rows import moment_of


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
@pytest.mark.parametrize(("out", "inner", "tokens"), [(24, 40, 400), (24, 40, 30), (40, 64, 36), (64, 40, 30)])
def test_either_way_gives_the_same(out: int, inner: int, tokens: int, weighted: bool) -> None:
    known = moments(out, inner, tokens, weighted=weighted)
    delta = torch.randn(out, inner, generator=torch.Generator().manual_seed(1))
    first, second = (way(delta, known, 16) for way in (_by_outputs, _by_inputs))
    assert first.total == pytest.approx(second.total, rel=1e-4)
    torch.testing.assert_close(first.gains[:12], second.gains[:12], rtol=1e-3, atol=1e-5 * first.total)
    if first.losses is not None:
        assert first.losses == pytest.approx(second.losses, rel=1e-3)


def test_few_tokens_give_few_components_and_gains_of_nothing_beyond() -> None:
    known = moments(24, 40, 10)
    found, lora_A, lora_B = with_components(torch.randn(24, 40), known, 20)
    assert len(found.gains) == 20 and lora_A.shape == (10, 40) and lora_B.shape == (24, 10)
    assert float(found.gains[10:].abs().sum()) == 0
    assert found.left(20) == pytest.approx(0, abs=1e-3 * found.total)


def test_no_components() -> None:
    assert len(forecast(torch.randn(24, 40), moments(24, 40, 60), 0).gains) == 0
