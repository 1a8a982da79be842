"""`eora quantize --total` from end to end: plan, quantise, refine, by both quantisers, and what it says of itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gptqmodel_eora_ext import Plan
from gptqmodel_eora_ext.adapter.summary import summarize
from gptqmodel_eora_ext.cli import app
from gptqmodel_eora_ext.evaluate.demo import demo_text
from gptqmodel_eora_ext.evaluate.size import COUNTED, tensor_bytes
from gptqmodel_eora_ext.hosts import recipes as running
from gptqmodel_eora_ext.plan import Recipe, recipes
from gptqmodel_eora_ext.refine import COMPLETE, INTERRUPTED

from .helpers import kernels, load
from .test_autoround import random_model

pytestmark = pytest.mark.e2e

SHORT = ["--samples", "8", "--seqlen", "64"]


@pytest.fixture
def short_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes, with fewer steps of AutoRound and fewer tokens to refine on: seconds in place of hours."""
    few = [
        replace(row, tuning={**row.tuning, "iters": 2} if row.tuning else {}, refine=min(row.refine, 5 * 512))
        for row in recipes.TABLE
    ]
    monkeypatch.setattr(recipes, "TABLE", tuple(few))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return random_model(tmp_path_factory.mktemp("tiny"), tokenizer, layers=2)


def quantize(model: Path, out: Path, *more: str) -> Any:
    arguments = ["quantize", str(model), str(out), "--calibration", str(demo_text("calibration")), *SHORT, *more]
    return CliRunner().invoke(app, arguments)


def test_the_best_recipe(short_table: None, tiny: Path, tmp_path: Path) -> None:
    """By AutoRound: it is as large as was asked, refined, and loads by what its files say; what is there is gone on
    with."""
    best = ("--total", "2.75bpw", "--effort", "best")
    out = tmp_path / "out"
    result = quantize(tiny, out, *best)
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "AutoRound, 2 steps a block" in told and "SmolLM2 loses 0.80 nats" in told and "Load it" in told
    plan = Plan.read(out / "plan.json")
    weights = sum(one.out_features * one.in_features for one in plan.modules.values())
    assert 2.7 < 8 * plan.total_bytes / weights <= 2.75
    # The next rank of the smallest module would not fit.
    assert plan.adapter_bytes >= 0.15 * weights / 8 and {one.bits for one in plan.modules.values()} > {2}
    loaded = kernels(load(out))
    assert {name: one.bits for name, one in loaded.items()} == {name: one.bits for name, one in plan.modules.items()}
    refined = summarize(out)
    assert refined.folder.name == "eora-refined"
    assert refined.details["refinement"]["tokens"] == 5 * 512
    assert refined.details["refinement"]["after"] <= refined.details["refinement"]["before"]
    assert tensor_bytes(out, COUNTED) + tensor_bytes(refined.folder) == plan.total_bytes

    # As an interruption while it was refined leaves it.
    details = refined.folder / "eora.json"
    content = json.loads(details.read_text())
    content["refinement"]["ended"] = INTERRUPTED
    details.write_text(json.dumps(content))
    names = ("model.safetensors", "eora-refined/adapter_model.safetensors")
    files = {one: (out / one).stat().st_mtime_ns for one in names}
    result = quantize(tiny, out, *best)
    assert result.exit_code == 0 and "goes on with what is there" in " ".join(result.output.split()), result.output
    later = {one: (out / one).stat().st_mtime_ns for one in files}
    assert [later[one] > files[one] for one in files] == [False, True]
    assert summarize(out).details["refinement"]["ended"] == COMPLETE
    result = quantize(tiny, out, *best)
    assert result.exit_code == 0 and later == {one: (out / one).stat().st_mtime_ns for one in files}
    result = quantize(tiny, out, "--total", "2.8bpw", "--effort", "best")
    assert result.exit_code == 2 and "is not empty" in result.output


def test_the_fast_recipe(short_table: None, tiny: Path, tmp_path: Path) -> None:
    """By GPTQ, without refinement; sizes are those on disk."""
    result = quantize(tiny, tmp_path / "out", "--total", "2.6bpw", "--effort", "fast")
    assert result.exit_code == 0, result.output
    plan = Plan.read(tmp_path / "out" / "plan.json")
    stored = tensor_bytes(tmp_path / "out", COUNTED) + tensor_bytes(tmp_path / "out" / "eora")
    assert stored == plan.total_bytes
    assert not (tmp_path / "out" / "eora-refined").exists()


def test_a_plan_for_autoround(tiny: Path, tmp_path: Path) -> None:
    """Made by its trial on layers of the model, and run by it without a note; GPTQ's run of it is noted."""
    plan = tmp_path / "plan.json"
    text = ["--calibration", str(demo_text("calibration")), *SHORT]
    given = ["plan", str(tiny), *text, "--quantizer", "autoround", "--iters", "1", "--total", "2.7bpw",
             "--out", str(plan), "--budget", "0.5bpw"]  # fmt: skip
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert f"--quantizer autoround --plan {plan}" in " ".join(result.output.split())
    assert Plan.read(plan).quantizer == "autoround"


def test_a_dry_run_stops_after_saying_what_it_would_do(tiny: Path, tmp_path: Path) -> None:
    result = quantize(tiny, tmp_path / "out", "--total", "2.75bpw", "--dry-run")
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "AutoRound, 50 steps a block" in told and "on 200,000 tokens" in told and "about" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--total", "1.5bpw"], "--total 1.5bpw is 1.500 bpw"),
        (["--total", "900MB"], "of this model; recipes reach 2.3"),
        (["--total", "2.75bpw", "--effort", "fast", "--format", "auto_gptq"], "auto_gptq is an export of AutoRound"),
    ],
)
def test_what_no_recipe_does(tiny: Path, tmp_path: Path, more: list[str], message: str) -> None:
    result = quantize(tiny, tmp_path / "out", *more)
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert not (tmp_path / "out").exists()


def test_too_little_text_to_refine_on(tiny: Path, tmp_path: Path) -> None:
    """Told before the model is quantised, not after."""
    with pytest.raises(ValueError, match="windows of 512 tokens; this recipe refines, which needs 5"):
        running.prepare_recipe(str(tiny), "2.75bpw", ["some words, again and again. " * 200], seqlen=64)


def test_python(tiny: Path) -> None:
    prepared = running.prepare_recipe(
        str(tiny), "2.75bpw", str(demo_text("calibration")), effort="fast", samples=4, seqlen=64
    )
    assert isinstance(prepared.recipe, Recipe) and "2.750 bpw" in str(prepared.recipe)
    assert len(prepared.calibration) == 4 and not prepared.refinement
