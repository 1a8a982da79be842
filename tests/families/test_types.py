"""The table of docs/budget.md tells of each model type what becomes of it: a tiny random model of each is tried."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Steps
from .steps import OF_GPTQMODEL, Found, assert_near

pytestmark = pytest.mark.families


def told() -> dict[str, str]:
    """Model type → what the table says of it."""
    text = (Path(__file__).parents[2] / "docs" / "budget.md").read_text(encoding="utf-8")
    rows = text[text.index("| | model types |") :].partition("\n\n")[0].splitlines()[2:]
    return {name: row.split("|")[1].strip() for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[2])}


def met(found: Found) -> str:
    """What the table should say, by what was found."""
    budget, rank = found.refused.get("default", ""), found.refused.get("plain", "")
    if not found.refused:
        assert {f"{case} logits" for case in OF_GPTQMODEL} <= found.logits.keys()
        return "served"
    if rank and "EoRA" not in rank:
        # The host stops without an adapter in the same way.
        assert rank.rpartition(" (")[0] in found.refused["no adapter"]
        return "GPTQModel itself stops"
    assert "EoRA" in budget
    assert "EoRA" in found.refused["planned"]
    if "quantises no expert" in rank:
        return "refused by name: GPTQModel quantises no expert"
    if "looks for the layers" in rank:
        return "refused by name: GPTQModel looks for layers where this transformers has none"
    assert "rank in place of the budget" in budget
    assert not rank
    return "refused by name: a budget alone"


@pytest.fixture(scope="module")
def finds(tmp_path_factory: pytest.TempPathFactory, run_step: Steps) -> Callable[[str, str], Found]:
    folder = tmp_path_factory.mktemp("types")
    types = sorted(told())
    for step in ("make", "gptqmodel", "apart"):
        run_step(folder, step, types)
    return lambda step, model_type: Found(folder, step, model_type).read()


@pytest.mark.parametrize("model_type", sorted(told()))
def test_a_type_meets_what_the_table_says(model_type: str, finds: Callable[[str, str], Found]) -> None:
    own, apart = finds("gptqmodel", model_type), finds("apart", model_type)
    word = met(own)
    assert word == told()[model_type]
    if word == "served":
        for case in OF_GPTQMODEL:
            assert_near(own.logits[f"{case} logits"], apart.logits[f"{case} logits"], own.logits[f"{case} without"])
