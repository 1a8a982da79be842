"""The moment of the output error, and the cross moment, against direct sums in float64."""

from __future__ import annotations

import pytest
import torch

from gptqmodel_eora_ext.capture import CrossMoment, OutputErrorMoment, SecondMoment, output_error
from gptqmodel_eora_ext.solve import eora, eora_from_outputs, weighted_energy


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_error_is_the_second_moment_seen_through_the_error(
    dtype: torch.dtype, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_error, "multiplies_bfloat16", lambda device: narrow)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 20, generator=generator).to(dtype)
    quantized = (weight + 0.1 * torch.randn(8, 20, generator=generator)).to(dtype)
    outputs, inputs = OutputErrorMoment(weight, quantized, "m"), SecondMoment(20, "m")
    for batch in range(3):
        rows = torch.randn(2, 16, 20, generator=generator).to(dtype)
        keep = torch.ones(2, 16)
        keep[0, 10 + batch :] = 0
        outputs.add(rows, keep)
        inputs.add(rows, keep)
    second_moment = inputs.mean().double()
    delta = weight.double() - quantized.double()
    assert outputs.tokens == inputs.tokens
    expected = delta @ second_moment @ delta.T
    # Rounding z to bfloat16 moves an entry by some 2⁻⁹ of it.
    rounded = narrow and dtype == torch.bfloat16
    rtol, atol = (4e-3, 4e-3 * float(expected.diagonal().mean())) if rounded else (1e-4, 1e-6)
    torch.testing.assert_close(outputs.mean().double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(outputs.energies().double(), second_moment.diagonal(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("large_token", [1.0, 100.0])
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_directions_survive_products_of_bfloat16(
    rank: int, large_token: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_error, "multiplies_bfloat16", lambda device: True)
    generator = torch.Generator().manual_seed(0)
    channels = torch.logspace(0, -4, 160)
    rows = (torch.randn(4000, 160, generator=generator) * channels).to(torch.bfloat16)
    # A few tokens of a direction of their own, which the first component corrects.
    rows[::250] = large_token * rows[0]
    weight = torch.randn(64, 160, generator=generator).to(torch.bfloat16)
    quantized = (weight + 0.1 * torch.randn(64, 160, generator=generator)).to(torch.bfloat16)
    outputs, inputs = OutputErrorMoment(weight, quantized, "m"), SecondMoment(160, "m")
    outputs.add(rows)
    inputs.add(rows)
    delta, second_moment = weight.double() - quantized.double(), inputs.mean().double()

    def left(factors: tuple[torch.Tensor, torch.Tensor]) -> float:
        return weighted_energy(delta - factors[1].double() @ factors[0].double(), second_moment)

    least = left(eora(delta, second_moment, rank, exact=True))
    assert left(eora_from_outputs(delta.float(), outputs.mean(), rank)) <= 1.001 * least + 1e-12


def test_signal_is_estimated_on_a_part_of_the_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 20, generator=generator)
    moment = OutputErrorMoment(weight, torch.zeros(8, 20), "m")
    rows = torch.randn(4000, 20, generator=generator)
    moment.add(rows)
    assert moment.signal == pytest.approx(float((rows @ weight.T).square().sum(1).mean()), rel=0.2)


def test_nothing_seen() -> None:
    moment = OutputErrorMoment(torch.zeros(3, 5), torch.zeros(3, 5), "m")
    assert moment.tokens == 0 and moment.signal == 0
    assert not moment.mean().any() and not moment.energies().any()


def test_the_cheaper_side() -> None:
    assert OutputErrorMoment.is_cheaper(576, 1536)
    assert not OutputErrorMoment.is_cheaper(576, 576)
    assert not OutputErrorMoment.is_cheaper(1536, 576)


def test_broken_inputs_name_the_module() -> None:
    moment = OutputErrorMoment(torch.ones(3, 5), torch.zeros(3, 5), "model.layers.0.mlp.down_proj")
    moment.add(torch.full((4, 5), torch.nan))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj: calibration activations hold NaN"):
        moment.require_finite()


def test_cross_moment() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, seen = (torch.randn(2, 9, 6, generator=generator) for _ in range(2))
    keep = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    moment = CrossMoment(6, "m")
    moment.add(clean, seen, keep)
    expected = clean[keep.bool()].double().T @ seen[keep.bool()].double() / 13
    torch.testing.assert_close(moment.mean().double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"\(2, 9, 6\) and the quantised model's \(2, 8, 6\) differ"):
        moment.add(clean, seen[:, :8])
