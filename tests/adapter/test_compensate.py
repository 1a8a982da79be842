"""One module's compensation: every objective and width of factors, and that the report tells the truth."""

from __future__ import annotations

import logging

import pytest
import torch

from gptqmodel_eora_ext.adapter.compensate import Recipe, compensate
from gptqmodel_eora_ext.adapter.factors import ModuleFactors
from gptqmodel_eora_ext.adapter.vocabulary import FACTOR_BITS, OBJECTIVES
from gptqmodel_eora_ext.capture import CrossMoment, OutputErrorMoment, SecondMoment
from gptqmodel_eora_ext.solve import weighted_energy

OUT, IN, TOKENS = 40, 70, 300


@pytest.fixture
def weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator)
    return weight, weight + 0.2 * torch.randn(OUT, IN, generator=generator)


@pytest.fixture
def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(TOKENS, IN, generator=generator) * torch.logspace(0, 1, IN)


@pytest.fixture
def moment(inputs: torch.Tensor) -> SecondMoment:
    made = SecondMoment(IN, "m")
    made.add(inputs)
    return made


def left(weights: tuple[torch.Tensor, torch.Tensor], moment: SecondMoment, factors: ModuleFactors) -> float:
    delta = weights[0].double() - weights[1].double()
    return weighted_energy(delta - factors.lora_B.double() @ factors.lora_A.double(), moment.mean().double())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("factor_bits", FACTOR_BITS)
def test_reported_error_is_that_of_the_stored_factors(
    objective: str, factor_bits: int, weights: tuple[torch.Tensor, torch.Tensor], moment: SecondMoment,
    inputs: torch.Tensor,
) -> None:  # fmt: skip
    cross = CrossMoment(IN, "m")
    cross.add(inputs + 0.1, inputs)
    made = compensate(*weights, moment, Recipe(12, objective, factor_bits), name="m", cross_moment=cross)
    assert made.error_after == pytest.approx(left(weights, moment, made), rel=1e-4)
    assert made.error_after < made.error_before
    assert (made.packed is not None) == (factor_bits < 16)
    if made.packed:
        assert torch.equal(made.lora_A, made.packed[0].dequantize(torch.float16))
        assert made.packed[0].bits == factor_bits


def test_eora_leaves_the_least_and_more_bits_leave_less(
    weights: tuple[torch.Tensor, torch.Tensor], moment: SecondMoment
) -> None:
    by_objective = {
        objective: compensate(*weights, moment, Recipe(12, objective), name="m").error_after
        for objective in ("eora", "diagonal", "svd")
    }
    assert by_objective["eora"] < min(by_objective["diagonal"], by_objective["svd"])
    by_bits = [compensate(*weights, moment, Recipe(12, "eora", bits), name="m").error_after for bits in FACTOR_BITS]
    assert by_bits == sorted(by_bits)


def test_both_moments_give_the_same_factors_and_report(
    weights: tuple[torch.Tensor, torch.Tensor], moment: SecondMoment, inputs: torch.Tensor
) -> None:
    outputs = OutputErrorMoment(*weights, "m")
    outputs.add(inputs)
    by_inputs, by_outputs = (compensate(*weights, one, Recipe(8), name="m") for one in (moment, outputs))
    assert by_outputs.error_before == pytest.approx(by_inputs.error_before, rel=1e-4)
    assert by_outputs.error_after == pytest.approx(left(weights, moment, by_outputs), rel=1e-4)
    assert by_outputs.error_after == pytest.approx(by_inputs.error_after, rel=1e-4)


@pytest.mark.parametrize("factor_bits", FACTOR_BITS)
def test_no_tokens_no_adapter(
    factor_bits: int, weights: tuple[torch.Tensor, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        made = compensate(*weights, SecondMoment(IN, "m"), Recipe(8, "eora", factor_bits), name="expert.3")
        outputs = compensate(*weights, OutputErrorMoment(*weights, "m"), Recipe(8), name="expert.4")
    assert made.rank == outputs.rank == 0 and made.packed is None
    assert "expert.3: saw 0 calibration tokens, too few for rank 8; using no adapter" in caplog.text
    assert "expert.4: saw 0 calibration tokens" in caplog.text


def test_broken_weights_name_the_module(weights: tuple[torch.Tensor, torch.Tensor], moment: SecondMoment) -> None:
    weights[1][3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"model\.x: the weights hold NaN or infinity"):
        compensate(*weights, moment, Recipe(4), name="model.x")
