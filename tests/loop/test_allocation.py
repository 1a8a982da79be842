"""Ranks chosen module by module: within the budget, in any order, close to the allocation that knows all."""

import random
import types
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch

from gptqmodel_eora_ext.formats.sizes import ModuleShape
from gptqmodel_eora_ext.loop.allocation import RankAllocation
from gptqmodel_eora_ext.loop.forecasts import HEADROOM, budget_question, forecast_allocation
from gptqmodel_eora_ext.plan.forecast import ModuleMoments, unreached, with_components
from gptqmodel_eora_ext.plan.ranks import (
    MOST_OF_UNIFORM,
    RANK_STEP,
    TokenCorrection,
    kind_of,
    most_rank,
    rank_options,
)
from gptqmodel_eora_ext.plan.sweep import Question, Rounding, Swept
from gptqmodel_eora_ext.solve import (
    Curve,
    Grid,
    allocate,
    column_order,
    component_gains,
    eora,
    error_loss,
    gptq,
    rank_curve,
)

LAYERS, FACTOR_BITS = 6, 4
SUBSETS = (("q_proj", "k_proj"), ("o_proj",), ("down_proj",))


@pytest.fixture(scope="module")
def shapes() -> list[ModuleShape]:
    sides = {"q_proj": (64, 96), "k_proj": (32, 96), "o_proj": (96, 64), "down_proj": (96, 128)}
    return [
        ModuleShape(f"{layer}.{name}", *sides[name]) for layer in range(LAYERS) for names in SUBSETS for name in names
    ]


@pytest.fixture(scope="module")
def weights(shapes: list[ModuleShape]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        shape.name: torch.randn(shape.out_features, shape.in_features, generator=generator)
        * torch.logspace(0, -2, shape.in_features)
        for shape in shapes
    }


@dataclass(frozen=True)
class Known:
    """Moments by module: of the gradient at the output, and of the inputs."""

    output_moments: Mapping[str, torch.Tensor]
    second_moments: Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def sensitivity(shapes: list[ModuleShape]) -> Known:
    generator = torch.Generator().manual_seed(1)

    def moment(features: int, scale: float) -> torch.Tensor:
        rows = torch.randn(300, features, generator=generator) * torch.logspace(0, -1, features) * scale
        return rows.T @ rows / 300

    # Later layers matter less: all modules alike would be wrong.
    return Known(
        {shape.name: moment(shape.out_features, 0.5 ** int(shape.name[0])) for shape in shapes},
        {shape.name: moment(shape.in_features, 1.0) for shape in shapes},
    )


def swept(
    shapes: list[ModuleShape],
    weights: dict[str, torch.Tensor],
    sensitivity: Known,
    question: Question,
    costs: Mapping[str, float],
) -> Swept:
    """Forecasts, and divergences as if second orders held."""
    forecasts, divergences = {}, dict.fromkeys((kind_of(shape.name) for shape in shapes), 0.0)
    for shape in shapes:
        name, weight = shape.name, weights[shape.name]
        inputs, output_moment = sensitivity.second_moments[name], sensitivity.output_moments[name]
        how = question.rounding(name)
        [rounded] = gptq(weight, column_order(inputs, how.grid.group_size), how.bits, how.grid)
        delta = weight - rounded
        known = ModuleMoments(inputs, output_moment)
        found, lora_A, lora_B = with_components(delta, known, question.rank(name, 2), question.uniform)
        left = delta - lora_B @ lora_A
        forecasts[name] = {2: found}
        divergences[kind_of(name)] += error_loss(left, inputs, output_moment) * costs.get(kind_of(name), 1.0)
    return Swept(forecasts, divergences, sensitivity.output_moments)


def allocation(
    shapes: list[ModuleShape],
    weights: dict[str, torch.Tensor],
    sensitivity: Known,
    budget: int,
    costs: Mapping[str, float] = types.MappingProxyType({}),
) -> RankAllocation:
    """Forecast, kinds of modules costing so many times what second orders tell."""
    question = budget_question(shapes, budget, FACTOR_BITS, lambda name: Rounding((2,), Grid(32)))
    found = swept(shapes, weights, sensitivity, question, costs)
    return forecast_allocation(shapes, budget, FACTOR_BITS, found)


def nearest(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    columns = column_order(torch.ones(weight.shape[1]), group_size)
    return gptq(weight, columns, [2], Grid(group_size, scale_search=2.0))[0]


def deltas(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the quantiser leaves is not what was forecast: another grid, another size by kind of module."""
    return {
        name: (weight - nearest(weight, 16)) * (0.5 if "k_proj" in name else 0.8) for name, weight in weights.items()
    }


def run(chosen: RankAllocation, errors: dict[str, torch.Tensor], sensitivity: Known, shuffle: bool = False) -> None:
    for layer in range(LAYERS):
        for subset in SUBSETS:
            names = [f"{layer}.{name}" for name in subset]
            chosen.begin(names)
            if shuffle:
                random.Random(layer).shuffle(names)
            for name in names:
                moment = sensitivity.second_moments[name]
                factors = eora(errors[name], moment, chosen.options[name].ranks[-1])
                kept = chosen.choose(name, *factors, moment, errors[name])
                assert len(kept) == chosen.ranks[name]


@pytest.mark.parametrize("budget", [2_000, 8_000, 20_000])
def test_within_budget_and_near_the_optimum(
    budget: int, shapes: list[ModuleShape], weights: dict[str, torch.Tensor], sensitivity: Known
) -> None:
    chosen = allocation(shapes, weights, sensitivity, budget)
    errors = deltas(weights)
    run(chosen, errors, sensitivity)
    largest_step = max(options.nbytes[1] for options in chosen.options.values())
    assert budget - 2 * largest_step <= chosen.spent <= budget
    # Hindsight: every spectrum known before the first choice.
    curves = []
    for name, error in errors.items():
        moment, output_moment = sensitivity.second_moments[name], sensitivity.output_moments[name]
        options = chosen.options[name]
        gains = component_gains(*eora(error, moment, options.ranks[-1]), moment, output_moment)
        total = error_loss(error, moment, output_moment)
        curves.append(rank_curve(gains.sort(descending=True).values, total, options.ranks, options.nbytes))
    best = sum(curve.losses[i] for curve, i in zip(curves, allocate(curves, budget), strict=True))
    nothing = sum(curve.losses[0] for curve in curves)
    # The last percents of the gain: forecasts are of another grid.
    assert nothing - sum(chosen.losses.values()) >= 0.93 * (nothing - best)


def test_the_order_within_a_subset_does_not_matter(
    shapes: list[ModuleShape], weights: dict[str, torch.Tensor], sensitivity: Known
) -> None:
    ranks = []
    for shuffle in (False, True):
        chosen = allocation(shapes, weights, sensitivity, 8_000)
        run(chosen, deltas(weights), sensitivity, shuffle)
        ranks.append(chosen.ranks)
    assert ranks[0] == ranks[1]


def test_sensitive_layers_get_more(
    shapes: list[ModuleShape], weights: dict[str, torch.Tensor], sensitivity: Known
) -> None:
    chosen = allocation(shapes, weights, sensitivity, 8_000)
    run(chosen, deltas(weights), sensitivity)
    by_layer = [sum(rank for name, rank in chosen.ranks.items() if name[0] == str(layer)) for layer in range(LAYERS)]
    assert by_layer[0] > 2 * by_layer[-1]


def test_modules_are_offered_what_they_may_take(
    shapes: list[ModuleShape], weights: dict[str, torch.Tensor], sensitivity: Known
) -> None:
    budget = 8_000
    most = most_rank(shapes, budget, FACTOR_BITS, MOST_OF_UNIFORM)
    chosen = allocation(shapes, weights, sensitivity, budget)
    offered = {name: options.ranks[-1] for name, options in chosen.options.items()}
    assert list(offered) == [shape.name for shape in shapes]
    assert offered["0.q_proj"] == most > HEADROOM * RANK_STEP and offered[f"{LAYERS - 1}.q_proj"] < most
    run(chosen, deltas(weights), sensitivity)
    assert budget - max(options.nbytes[1] for options in chosen.options.values()) <= chosen.spent


def test_a_kind_that_costs_more_than_second_orders_tell_gets_more(
    shapes: list[ModuleShape], weights: dict[str, torch.Tensor], sensitivity: Known
) -> None:
    ranks = []
    for cost in (1.0, 5.0):
        chosen = allocation(shapes, weights, sensitivity, 8_000, {"k_proj": cost})
        run(chosen, deltas(weights), sensitivity)
        ranks.append(sum(rank for name, rank in chosen.ranks.items() if kind_of(name) == "k_proj"))
    assert ranks[1] > 1.5 * ranks[0]


def test_options_are_multiples_within_the_shape() -> None:
    shape = ModuleShape("m", 30, 100)
    assert rank_options(shape, 1000, 16).ranks == (0, 8, 16, 24)
    assert rank_options(shape, 16, 16).nbytes == (2 * 130, 8 * 2 * 130, 16 * 2 * 130)
    assert rank_options(shape, 16, 4).nbytes == (0, 8 * 71, 16 * 71)
    assert rank_options(shape, 16, 16, fixed=5).ranks == (5,)
    assert most_rank([shape], 1, 16) == RANK_STEP


def test_modules_that_cannot_take_what_is_on_offer(
    shapes: list[ModuleShape], weights: dict[str, torch.Tensor], sensitivity: Known
) -> None:
    """One that few tokens reach is solved at a lower rank; one that none reach is not asked and reserves nothing."""
    chosen = allocation(shapes, weights, sensitivity, 20_000)
    name, unreached = "0.q_proj", "0.k_proj"
    chosen.begin([name, unreached])
    moment = sensitivity.second_moments[name]
    kept = chosen.choose(name, *eora(weights[name], moment, 3), moment, weights[name])
    assert chosen.ranks[name] == len(kept) <= 3
    chosen.begin(["0.o_proj"])
    assert chosen.ranks[unreached] == 0


def test_what_no_token_reached_gets_nothing(
    shapes: list[ModuleShape], weights: dict[str, torch.Tensor], sensitivity: Known
) -> None:
    question = budget_question(shapes, 8_000, FACTOR_BITS, lambda name: Rounding((2,), Grid(32)))
    found = swept(shapes, weights, sensitivity, question, {})
    name = "0.q_proj"
    missing = {2: unreached(question.rank(name, 2))}
    reached = {one: moment for one, moment in found.output_moments.items() if one != name}
    chosen = forecast_allocation(
        shapes, 8_000, FACTOR_BITS, Swept({**found.forecasts, name: missing}, found.divergences, reached)
    )
    assert chosen.options[name].ranks == (0,) and chosen.options["1.q_proj"].ranks[-1] > 0


def test_experts_of_one_tensor_choose_together() -> None:
    """One rank for all at the bytes of all; who is offered less keeps less, and is filled up with zeros in the file."""
    features, experts = 32, ("a", "b", "few")
    generator = torch.Generator().manual_seed(0)
    shape = ModuleShape("any", features, features)
    offered = rank_options(shape, 24, FACTOR_BITS)
    errors = {name: torch.randn(features, features, generator=generator) for name in (*experts, "alone")}
    curves = {name: Curve(offered.nbytes, tuple(4.0 - index for index in range(len(offered.ranks)))) for name in errors}
    options = dict.fromkeys(errors, offered)
    options["few"], curves["few"] = offered.first(2), curves["few"].first(2)
    curves["alone"] = curves["alone"].scaled(0.1)
    experts_of = dict.fromkeys(experts, "tensor")
    identity = dict.fromkeys(errors, torch.eye(features))
    corrections = dict.fromkeys(errors, TokenCorrection())
    # Enough for two of three steps for all.
    budget = 4 * offered.nbytes[2]
    chosen = RankAllocation(options, curves, identity, corrections, budget, experts_of)
    for subset in (experts, ("alone",)):
        chosen.begin(subset)
        for name in subset:
            factors = eora(errors[name], identity[name], options[name].ranks[-1])
            chosen.choose(name, *factors, identity[name], errors[name])
    assert chosen.ranks["a"] == chosen.ranks["b"] > chosen.ranks["few"] == offered.ranks[1]
    spent_on = dict(zip(offered.ranks, offered.nbytes, strict=True))
    assert chosen.spent == 3 * spent_on[chosen.ranks["a"]] + spent_on[chosen.ranks["alone"]] <= budget
    again = RankAllocation(options, curves, identity, corrections, budget, experts_of)
    again.load_state(chosen.state())
    assert again.state() == chosen.state()
