"""Plans on disk: read as they were written, and refused where they are broken or of another model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptqmodel_eora_ext.formats.sizes import ModuleShape
from gptqmodel_eora_ext.plan import ModulePlan, Plan, PlanError, PlannedModule, planned
from gptqmodel_eora_ext.plan.modules import plain_bytes
from gptqmodel_eora_ext.solve import Grid


@pytest.fixture(scope="module")
def plan(modules: list[PlannedModule], shapes: list[ModuleShape], grid: Grid) -> Plan:
    total = round(1.2 * plain_bytes(shapes, 2, grid.group_size))
    return planned(modules, total, grid, 4, model="some/model", sensitivity="fisher")


def test_read_as_written(plan: Plan, tmp_path: Path) -> None:
    assert plan.largest_rank
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["dynamic"] == plan.dynamic()


def test_what_gptqmodel_is_given(plan: Plan) -> None:
    from gptqmodel import QuantizeConfig

    config = QuantizeConfig(**plan.quantize_config())
    for name, one in plan.modules.items():
        assert config.dynamic_get(name, "bits") == one.bits
        assert config.dynamic_get(name, "adapter", sub_key="rank") == one.rank
    assert config.dynamic_get("aa") is None, "names are exact"


def test_files_that_name_no_quantizer_are_of_gptq(plan: Plan, tmp_path: Path) -> None:
    content = altered(plan)
    assert content.pop("quantizer") == "gptq"
    (tmp_path / "plan.json").write_text(json.dumps(content))
    assert Plan.read(tmp_path / "plan.json") == plan


def altered(plan: Plan, **changes: Any) -> dict[str, Any]:
    content = json.loads(json.dumps({"format": "eora-plan-1", **plan.__dict__, "modules": {}}))
    content["modules"] = {name: one.__dict__ for name, one in plan.modules.items()}
    return {**content, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "eora-plan-9"}, "has the format 'eora-plan-9', expected 'eora-plan-1'"),
        ({"extra": 1}, r"missing \[\], unknown \['extra'\]"),
        ({"modules": {}}, "`modules` must name the modules"),
        ({"modules": {"a": 3}}, "a must be an object, got 3"),
        ({"modules": {"a": {"bits": 2}}}, "a: missing .*rank"),
        ({"factor_bits": 5}, "`factor_bits` must be one of 16, 8, 4, got 5"),
        ({"quantizer": "awq"}, "`quantizer` must be one of gptq, autoround, got 'awq'"),
        ({"dynamic": {}}, "`dynamic` does not say what `modules` says"),
    ],
)
def test_broken_files(plan: Plan, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(altered(plan, **changes)))
    with pytest.raises(PlanError, match=message):
        Plan.read(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bits", 5, "a: `bits` must be one of 2, 3, 4, 8, got 5"),
        ("rank", -1, "a: `rank` must be at least 0, got -1"),
        ("in_features", "many", "a: `in_features` must be an integer, got 'many'"),
    ],
)
def test_broken_modules(plan: Plan, tmp_path: Path, key: str, value: Any, message: str) -> None:
    content = altered(plan)
    content["modules"]["a"] = {**content["modules"]["a"], key: value}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=message):
        Plan.read(tmp_path / "plan.json")


def test_no_json_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    for path in (tmp_path / "plan.json", tmp_path / "missing.json"):
        with pytest.raises(PlanError, match="is no plan"):
            Plan.read(path)


def test_of_another_model(plan: Plan, shapes: list[ModuleShape]) -> None:
    plan.check(shapes)
    with pytest.raises(PlanError, match=r"names 3 modules; the model has no c\. Make a plan"):
        plan.check(shapes[:2])
    with pytest.raises(PlanError, match=r"the model also has d\."):
        plan.check([*shapes, ModuleShape("d", 8, 8)])
    other = replace(plan, modules={**plan.modules, "a": ModulePlan(64, 64, 2, 8)})
    with pytest.raises(PlanError, match=r"a: the plan for `some/model` expects 64 × 64, found 64 × 128"):
        other.check(shapes)
