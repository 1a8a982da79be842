"""Plans through GPTQModel: made by the command, checked against the model, run, saved, loaded, generating."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from typer.testing import CliRunner

from gptqmodel_eora_ext import EoRA, Plan
from gptqmodel_eora_ext.cli import app
from gptqmodel_eora_ext.evaluate.demo import demo_text
from gptqmodel_eora_ext.formats.sizes import ModuleShape, factor_bytes, weight_bytes
from gptqmodel_eora_ext.hosts.gptqmodel.modules import module_shapes
from gptqmodel_eora_ext.hosts.gptqmodel.planned import check_plan, warn_if_dominated
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.plan import ModulePlan, PlanError

from .helpers import Batches, kernels, load, measured_errors, quantize
from .test_checkpoint import logits

pytestmark = pytest.mark.e2e

GROUP_SIZE = 64
RANKS = (0, 8, 24)
BITS = (2, 3, 4)


def opened(base: Path, config: Any) -> Any:
    with quiet():
        return GPTQModel.load(str(base), config)


@pytest.fixture(scope="module")
def shapes(two_layers: Path) -> list[ModuleShape]:
    return module_shapes(opened(two_layers, QuantizeConfig(bits=2, group_size=GROUP_SIZE)))


@pytest.fixture(scope="module")
def plan(shapes: list[ModuleShape]) -> Plan:
    """Every pair of widths and ranks, modules that share an input among them."""
    modules = {
        shape.name: ModulePlan(shape.out_features, shape.in_features, BITS[i % 3], RANKS[i // 3 % 3])
        for i, shape in enumerate(shapes)
    }
    adapter_bytes = sum(factor_bytes(modules[shape.name].rank, shape, 4) for shape in shapes)
    weights = sum(weight_bytes(shape, modules[shape.name].bits, GROUP_SIZE) for shape in shapes)
    return Plan("two layers", "fisher", GROUP_SIZE, True, 0.0, 4, weights + adapter_bytes, adapter_bytes, 1.0, modules)


def test_a_plan_is_what_is_saved_and_loaded(
    plan: Plan, two_layers: Path, calibration: Batches, token_ids: list[int], tmp_path: Path
) -> None:
    plan.write(tmp_path / "plan.json")
    config = QuantizeConfig(**plan.quantize_config())
    made = quantize(two_layers, tmp_path / "model", config, calibration, adapter=EoRA(plan=tmp_path / "plan.json"))
    assert sum(one.nbytes for one in made.factors.values()) == plan.adapter_bytes
    model = load(made.folder)
    loaded = kernels(model)
    assert set(loaded) == set(plan.modules)
    for name, one in plan.modules.items():
        assert loaded[name].bits == one.bits
        assert (loaded[name].adapter.rank if loaded[name].adapter.lora_A is not None else 0) == one.rank
    errors = measured_errors(two_layers, model, calibration)
    for name, factors in made.factors.items():
        assert errors[name] == pytest.approx(factors.error_after, rel=0.1)
    # The kernels that are picked by themselves read the same mix.
    prompt = token_ids[2000:2100]
    with quiet():
        picked = GPTQModel.load(str(made.folder))
        assert picked.generate(torch.tensor([prompt]), max_new_tokens=2).shape == (1, len(prompt) + 2)
    expected, found = (logits(one, prompt).float() for one in (model, picked.model))
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_model_loaded_otherwise_is_refused(plan: Plan, two_layers: Path) -> None:
    planned = plan.quantize_config()
    name = next(name for name, one in plan.modules.items() if one.rank)
    for changes, message in (
        ({"group_size": 32}, "`group_size` is 32, the plan says 64. Load the model with"),
        ({"dynamic": None}, "`dynamic` gives .* bits and rank 0, the plan"),
    ):
        host = opened(two_layers, QuantizeConfig(**{**planned, **changes}))
        with pytest.raises(PlanError, match=message):
            check_plan(host, plan)
    host = opened(two_layers, QuantizeConfig(**planned))
    check_plan(host, plan)
    with pytest.raises(PlanError, match=rf"{name}: the plan for `two layers` expects 8 × 8, found"):
        check_plan(host, replace(plan, modules={**plan.modules, name: ModulePlan(8, 8, *_choice(plan, name))}))


def _choice(plan: Plan, name: str) -> tuple[int, int]:
    return plan.modules[name].bits, plan.modules[name].rank


def test_a_plan_and_a_rank_exclude_each_other(plan: Plan) -> None:
    with pytest.raises(ValueError, match="`plan` names the ranks"):
        EoRA(rank=8, plan=plan)
    bare = replace(plan, modules={name: replace(one, rank=0) for name, one in plan.modules.items()})
    with pytest.raises(ValueError, match="gives no module an adapter"):
        EoRA(plan=bare)
    assert all(set(override) == {"bits"} for override in bare.dynamic().values())


@pytest.mark.parametrize(
    ("adapter", "warned"),
    [
        (EoRA(rank=16, factor_bits=4), False),
        (EoRA(rank=32), True),
        (EoRA("auto", budget="0.9bpw"), False),
        (EoRA("auto", budget="1.1bpw"), True),
    ],
)
def test_larger_than_the_next_width_is_warned_about(
    two_layers: Path, adapter: EoRA, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    host = opened(two_layers, QuantizeConfig(bits=2, group_size=GROUP_SIZE))
    with caplog.at_level(logging.WARNING, logger="gptqmodel_eora_ext"):
        warn_if_dominated(host, adapter)
    assert bool(caplog.messages) == warned
    if warned:
        assert "more than plain 3 bits" in caplog.messages[0] and "`eora plan`" in caplog.messages[0]


def test_the_command_plans_under_a_total(two_layers: Path, shapes: list[ModuleShape], tmp_path: Path) -> None:
    arguments = ["plan", str(two_layers), "--calibration", str(demo_text("calibration")), "--samples", "8",
                 "--seqlen", "64", "--total", "2.75bpw", "--out", str(tmp_path / "plan.json"), "--budget", "0.25bpw",
                 "--budget", "1.5bpw", "--factor-bits", "16", "--factor-bits", "4", "--mse", "0",
                 "--picture", str(tmp_path / "plan.svg"), "--json"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    points = json.loads(result.stdout)
    assert {point["ranks"] for point in points} == {"none", "uniform", "auto", "mixed"}
    large = [point for point in points if point["budget"] == "1.5bpw" and point["factor_bits"] == 16]
    assert any(point["dominated_by"] == "plain 3 bits" for point in large)
    made = Plan.read(tmp_path / "plan.json")
    made.check(shapes)
    allowed = 2.75 * sum(shape.weights for shape in shapes) / 8
    assert 0.99 * allowed < made.total_bytes <= allowed
    assert "<svg" in (tmp_path / "plan.svg").read_text()
