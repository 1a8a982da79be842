"""Recipes: the table says what results files say, and a total out of reach is refused with those within."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptqmodel_eora_ext.formats.sizes import ModuleShape
from gptqmodel_eora_ext.plan import EFFORTS, PLANNED_BITS, recipe_of
from gptqmodel_eora_ext.plan.modules import plain_bytes
from gptqmodel_eora_ext.plan.recipes import AUTOROUND, EVERY, GPTQ, GROUP_SIZE, TABLE

ROOT = Path(__file__).parents[2]
TEXTS = ("wikitext2", "c4")
SHAPES = [ModuleShape(f"layers.{i}.{name}", 576, 576) for i in range(4) for name in ("q_proj", "o_proj")]


def test_every_effort_serves_every_size() -> None:
    for effort in EFFORTS:
        rows = [row for row in TABLE if row.effort == effort]
        assert [row.up_to for row in rows] == sorted(row.up_to for row in rows)
        assert rows[-1].up_to == EVERY


def test_losses_are_those_of_the_results() -> None:
    for row in TABLE:
        assert bool(row.losses) == bool(row.source)
        if not row.source:
            assert "not measured" in row.why
            continue
        result = json.loads((ROOT / row.source).read_text())
        measured = [run for run in result["runs"] if run.get("kind") == "mix" or run.get("contender") == row.effort]
        found = {run["total"]: run["loss"] for run in measured}
        for total, losses in row.losses.items():
            lost = [found[f"{total}bpw"][text] - result["full"][text] for text in TEXTS]
            assert losses == pytest.approx(lost, abs=0.005)


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_recipe_tells_what_it_is(effort: str) -> None:
    recipe = recipe_of("2.75bpw", effort, SHAPES)
    assert recipe.bpw == pytest.approx(2.75, abs=1e-3)
    told = str(recipe)
    assert f"recipe: {effort}, 2.750 bpw" in told and recipe.row.why in told
    assert ("AutoRound" in told) == (recipe.row.quantizer == AUTOROUND)
    assert recipe.seconds(512) > 0


def test_more_effort_takes_longer() -> None:
    took = [recipe_of("2.75bpw", effort, SHAPES).seconds(512) for effort in EFFORTS]
    assert took == sorted(took) and len(set(took)) == len(took)
    assert recipe_of("2.75bpw", EFFORTS[0], SHAPES).row.quantizer == GPTQ


@pytest.mark.parametrize("total", ["2.28bpw", "4.7bpw", 1000])
def test_totals_out_of_reach(total: str | int) -> None:
    largest = plain_bytes(SHAPES, PLANNED_BITS[-1], GROUP_SIZE)
    with pytest.raises(ValueError, match=r"of this model; recipes reach 2\.\d+ bpw .* to 4\.\d+ bpw") as caught:
        recipe_of(total, "best", SHAPES, what="--total")
    assert str(caught.value).startswith(f"--total {total} is ")
    least, most = (int(part.split(" bytes")[0]) for part in str(caught.value).split("recipes reach")[1].split("(")[1:3])
    assert plain_bytes(SHAPES, PLANNED_BITS[0], GROUP_SIZE) < least < largest < most
    assert recipe_of(least, "best", SHAPES).total == least
    assert recipe_of(most, "best", SHAPES).total == most


def test_an_unknown_effort() -> None:
    with pytest.raises(ValueError, match="effort must be one of fast, balanced, best, got 'most'"):
        recipe_of("2.75bpw", "most", SHAPES)
