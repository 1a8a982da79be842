"""One sweep, a layer at a time, against the whole model: second moments, forecasts, and divergences by kind."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.plan.forecast import ModuleMoments, with_components
from gptqmodel_eora_ext.plan.ranks import kind_of
from gptqmodel_eora_ext.plan.rows import moment_of
from gptqmodel_eora_ext.plan.survey import survey
from gptqmodel_eora_ext.plan.sweep import LayerInputs, Question, Rounding, _tell_routing, layer_inputs, sweep
from gptqmodel_eora_ext.solve import Grid, Moment, RowMoment, column_order, gptq

from .helpers import CONFIGS, TOKENS, architecture, in_files, in_memory, linears, mixed_batches, tiny_model, windows
from .test_sensitivity import by_autograd

GRID = Grid(16)
RANK, UNIFORM = 6, 2
QUESTION = Question(lambda name: Rounding((3,), GRID), lambda name, bits: RANK, uniform=UNIFORM)


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    whole = architecture(name)
    _, expected = by_autograd(whole, mixed_batches())
    model = in_files(whole, tmp_path)
    seen = set()
    for layer in layer_inputs(model, list(expected), model.begin(mixed_batches())):
        for module, leader in layer.leaders.items():
            seen.add(module)
            torch.testing.assert_close(layer.rows[leader], expected[module], rtol=1e-4, atol=1e-5)
        assert len({layer.leaders[one] for one in layer.linears if one.endswith(("q_proj", "k_proj", "v_proj"))}) == 1
        assert len(layer.rows) == 4
    assert seen == set(expected)


@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
def test_forecasts_and_divergences_are_those_of_the_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = architecture(name)
    pulled, read = by_autograd(whole, mixed_batches())
    kind_batches = [{"input_ids": torch.cat([one["input_ids"] for one in windows(2, 9)])}]
    monkeypatch.setattr("gptqmodel_eora_ext.plan.survey.unseen_tokens", lambda batches: [
        {**one, "attention_mask": torch.ones_like(one["input_ids"])} for one in kind_batches
    ])  # fmt: skip
    model = in_files(whole, tmp_path / "model")
    found = survey(model, list(read), mixed_batches(), QUESTION, kind="empirical", with_kinds=True)
    bare = survey(model, list(read), mixed_batches(), replace(QUESTION, weighed=False), kind="empirical",
                  with_kinds=False)  # fmt: skip
    assert all(one[3].correction.head == one[3].correction.tail == 1 for one in bare.forecasts.values())
    replaced: dict[str, dict[str, torch.Tensor]] = {}
    for module, rows in read.items():
        weight, gradient = linears(whole)[module].weight.detach(), pulled[module]
        squares = gradient.square().sum(1, keepdim=True)
        known = ModuleMoments(
            moment_of(rows, module),
            moment_of(gradient, module),
            moment_of(rows * squares.sqrt(), module, float(squares.sum())),
        )
        [rounded] = gptq(weight, column_order(known.inputs, GRID.group_size), [3], GRID)
        expected, lora_A, lora_B = with_components(weight - rounded, known, RANK, UNIFORM)
        forecast = found.forecasts[module][3]
        assert forecast.total == pytest.approx(expected.total, rel=1e-2)
        assert float(forecast.gains.sum()) == pytest.approx(float(expected.gains.sum()), rel=1e-2)
        assert forecast.correction.head == pytest.approx(expected.correction.head, rel=1e-2)
        compensated = rounded + lora_B @ lora_A
        replaced.setdefault(kind_of(module), {})[module] = compensated
    with torch.no_grad():
        plain = whole(**kind_batches[0]).logits.log_softmax(-1)
        for kind, weights in replaced.items():
            originals = {module: linears(whole)[module].weight.data for module in weights}
            for module, weight in weights.items():
                linears(whole)[module].weight.data = weight
            other = whole(**kind_batches[0]).logits.log_softmax(-1)
            for module, weight in originals.items():
                linears(whole)[module].weight.data = weight
            divergence = float((plain.exp() * (plain - other)).sum(-1).mean())
            assert found.divergences[kind] == pytest.approx(divergence, rel=2e-2)


def test_few_tokens_give_rows_and_many_a_matrix() -> None:
    rows = torch.randn(10, 24)
    few, many = moment_of(rows, "m"), moment_of(rows.T, "m")
    assert isinstance(few, RowMoment) and isinstance(many, torch.Tensor) and many.shape == (10, 10)
    torch.testing.assert_close(few.dense(), rows.T @ rows / 10)
    torch.testing.assert_close(moment_of(rows.T, "m", 48.0), rows @ rows.T / 48)
    with pytest.raises(ValueError, match="NaN or infinity"):
        moment_of(rows / 0, "m")


def test_relative_weighs_by_the_output() -> None:
    whole = tiny_model()
    _, read = by_autograd(whole, windows(2))
    found = survey(in_memory(whole), list(read), windows(2), QUESTION, kind="relative", with_kinds=False)
    assert found.divergences == {}
    for module, rows in read.items():
        weight = linears(whole)[module].weight.detach()
        expected = 1 / (rows @ weight.T).square().sum(1).mean()
        moment = found.output_moments[module]
        torch.testing.assert_close(moment, torch.full((len(weight),), float(expected)), rtol=1e-4, atol=0)


def test_known_weights_are_not_rounded_and_what_is_not_reached_loses_nothing() -> None:
    whole = tiny_model()
    whole.model.layers[0].mlp.spare = torch.nn.Linear(16, 8)

    def halved(name: str, weight: torch.Tensor, moment: Moment) -> torch.Tensor:
        return weight * 0.5

    names = list(linears(whole))
    question = Question(lambda name: Rounding((2,), GRID), lambda name, bits: RANK, halved)
    found = sweep(in_memory(whole), names, windows(1), None, question)
    spare = "model.layers.0.mlp.spare"
    assert spare not in found.output_moments and found.forecasts[spare][2].total == 0
    # Half of the output is lost, a quarter of its square, and half of that is the loss of a relative error.
    for name in names:
        if name != spare:
            assert found.forecasts[name][2].total == pytest.approx(0.125, rel=1e-3)


def test_several_widths_and_no_spread() -> None:
    question = Question(lambda name: Rounding((2, 4), GRID, spreads=False), lambda name, bits: 8 // bits)
    found = sweep(in_memory(tiny_model()), list(linears(tiny_model())), windows(1), None, question)
    for by_bits in found.forecasts.values():
        assert by_bits[2].total > by_bits[4].total
        assert {bits: len(one.gains) for bits, one in by_bits.items()} == {2: 4, 4: 2}


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind must be one of"):
        survey(in_memory(tiny_model()), list(linears(tiny_model())), windows(1), QUESTION, kind="exact",
               with_kinds=False)  # fmt: skip


def test_a_layer_at_a_time(tmp_path: Path) -> None:
    """No more than one layer's weights are in memory whenever anything is computed."""
    model = in_files(architecture("llama"), tmp_path)
    held: list[set[str]] = []

    def watched(items: Any) -> Any:
        for item in items:
            yield item
            held.append({name for name, one in model.model.named_parameters() if not one.is_meta})

    for layer in layer_inputs(model, list(linears(model.model)), model.begin(windows(1)), watched):
        present = {name.split(".")[2] for name, one in model.model.named_parameters() if not one.is_meta}
        assert present == {str(layer.index)}
    assert held == [set()] * 3 and TOKENS


def test_what_a_large_module_leaves_free_is_given_back_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the peak of a model of many layers is above that of a model of few, by holes in the heap."""
    steps: list[str] = []

    def rounding(*asked: Any) -> Any:
        steps.append("rounded")
        return gptq(*asked)

    monkeypatch.setattr("gptqmodel_eora_ext.plan.sweep.LARGE", 0)
    monkeypatch.setattr("gptqmodel_eora_ext.plan.sweep.gptq", rounding)
    monkeypatch.setattr("gptqmodel_eora_ext.plan.sweep.release_free_memory", lambda: steps.append("given back"))
    modules = list(linears(tiny_model()))
    sweep(in_memory(tiny_model()), modules, windows(1), None, QUESTION)
    assert steps.count("rounded") == len(modules)
    assert all(before == "given back" for before, step in pairwise(steps) if step == "rounded")


def test_experts_of_few_tokens_and_of_none_are_told_of_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    experts = {f"layers.3.experts.{number}": torch.nn.Linear(4, 4) for number in range(4)}
    rows = {f"layers.3.experts.{number}": torch.ones(tokens, 4) for number, tokens in enumerate((10, 20, 600))}
    inputs = LayerInputs(3, experts, {name: name for name in rows}, rows)
    _tell_routing(inputs, list(rows), 1000)
    (told,) = [one.getMessage() for one in caplog.records]
    assert "layer 3: of 4 modules 2 were reached by fewer than 256 of 1000" in told
    assert "1 by none" in told and "layers.3.experts.3" in told
    caplog.clear()
    _tell_routing(LayerInputs(3, dict(list(experts.items())[2:3]), inputs.leaders, rows), list(rows)[2:], 1000)
    assert not caplog.records
