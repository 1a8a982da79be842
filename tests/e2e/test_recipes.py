"""`eora quantize --total` from end to end: plan, quantise, refine, by both quantisers, and what it says of itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gptqmodel_eora_ext import Plan
from gptqmodel_eora_ext.adapter.summary import summarize
from gptqmodel_eora_ext.cli import app
from gptqmodel_eora_ext.evaluate.demo import demo_text
from gptqmodel_eora_ext.evaluate.size import weight_bytes
from gptqmodel_eora_ext.hosts import recipes as running
from gptqmodel_eora_ext.plan import Recipe, recipes

from .helpers import kernels, load

pytestmark = pytest.mark.e2e

SHORT = ["--samples", "8", "--seqlen", "64"]


@pytest.fixture
def short_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes, with fewer steps of AutoRound and fewer tokens to refine on: seconds in place of hours."""
    few = [
        replace(row, tuning={**row.tuning, "iters": 2} if row.tuning else {}, refine=min(row.refine, 8 * 512))
        for row in recipes.TABLE
    ]
    monkeypatch.setattr(recipes, "TABLE", tuple(few))


def quantize(model: Path, out: Path, *more: str) -> Any:
    arguments = ["quantize", str(model), str(out), "--calibration", str(demo_text("calibration")), *SHORT, *more]
    return CliRunner().invoke(app, arguments)


def test_the_best_recipe(short_table: None, two_layers: Path, tmp_path: Path) -> None:
    """By AutoRound: it is as large as was asked, refined, and loads by what its files say."""
    result = quantize(two_layers, tmp_path / "out", "--total", "2.75bpw", "--effort", "best")
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "AutoRound, 2 steps a block" in told and "not yet as a whole" in told and "Load it" in told
    plan = Plan.read(tmp_path / "out" / "plan.json")
    weights = sum(one.out_features * one.in_features for one in plan.modules.values())
    assert 2.74 < 8 * plan.total_bytes / weights <= 2.75
    assert plan.adapter_bytes >= 0.2 * weights / 8 and {one.bits for one in plan.modules.values()} > {2}
    model = load(tmp_path / "out")
    loaded = kernels(model)
    assert {name: one.bits for name, one in loaded.items()} == {name: one.bits for name, one in plan.modules.items()}
    refined = summarize(tmp_path / "out")
    assert refined.folder.name == "eora-refined" and refined.details is not None
    assert refined.details["refinement"]["tokens"] == 8 * 512
    assert refined.details["refinement"]["after"] <= refined.details["refinement"]["before"]


def test_the_fast_recipe_and_its_size_on_disk(short_table: None, two_layers: Path, tmp_path: Path) -> None:
    """By GPTQ; the total is that of files, but for what is not quantised and GPTQ's index of columns."""
    result = quantize(two_layers, tmp_path / "out", "--total", "2.6bpw", "--effort", "fast")
    assert result.exit_code == 0, result.output
    plan = Plan.read(tmp_path / "out" / "plan.json")
    adapter = summarize(tmp_path / "out")
    model = load(tmp_path / "out")
    index = sum(one.g_idx.numel() * one.g_idx.element_size() for one in kernels(model).values())
    others = sum(one.numel() * one.element_size() for name, one in model.state_dict().items()
                 if "embed" in name or "norm" in name)  # fmt: skip
    files = weight_bytes(tmp_path / "out") + adapter.bytes
    assert files - index - others == pytest.approx(plan.total_bytes, rel=0.02)
    assert not (tmp_path / "out" / "eora-refined").exists()


def test_a_dry_run_stops_after_saying_what_it_would_do(two_layers: Path, tmp_path: Path) -> None:
    result = quantize(two_layers, tmp_path / "out", "--total", "2.75bpw", "--dry-run")
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "AutoRound, 50 steps a block" in told and "on 200,000 tokens" in told and "about" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--total", "1.5bpw"], "--total 1.5bpw is 1.500 bpw"),
        (["--total", "900MB"], "of this model; recipes reach 2.2"),
    ],
)
def test_totals_out_of_reach(two_layers: Path, tmp_path: Path, more: list[str], message: str) -> None:
    result = quantize(two_layers, tmp_path / "out", *more)
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert not (tmp_path / "out").exists()


def test_too_little_text_to_refine_on(two_layers: Path, tmp_path: Path) -> None:
    """Told before the model is quantised, not after."""
    with pytest.raises(ValueError, match="windows of 512 tokens; this recipe refines, which needs 5"):
        running.prepare_recipe(str(two_layers), "2.75bpw", ["some words, again and again. " * 200], seqlen=64)


def test_python(two_layers: Path) -> None:
    prepared = running.prepare_recipe(
        str(two_layers), "2.75bpw", str(demo_text("calibration")), effort="fast", samples=4, seqlen=64
    )
    assert isinstance(prepared.recipe, Recipe) and "2.750 bpw" in str(prepared.recipe)
    assert len(prepared.calibration) == 4 and not prepared.refinement
