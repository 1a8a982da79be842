"""Rounds, presets and `EoRA()` without arguments, on real weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gptqmodel import GPTAQConfig, QuantizeConfig, RTNConfig

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.adapter.budget import budget_bytes
from gptqmodel_eora_ext.adapter.presets import DEFAULT_BUDGET, PRESETS
from gptqmodel_eora_ext.formats.sizes import ModuleShape, factor_bytes
from gptqmodel_eora_ext.hosts.gptqmodel.run import rounds_to_make

from .helpers import Batches, Made, quantize

pytestmark = pytest.mark.e2e

# These read what the model full of errors does not change: the same inputs, whatever was done to modules before.
FIRST = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]


def gptq(**options: Any) -> QuantizeConfig:
    return QuantizeConfig(bits=2, group_size=64, **options)


def details(made: Made) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((made.folder / "eora" / "eora.json").read_text())
    return report


def test_rounds_leave_less_of_the_error(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    left = {}
    for rounds in (1, 2):
        adapter = EoRA(rank=16, rounds=rounds)
        made = quantize(two_layers, tmp_path / str(rounds), gptq(mse=2.4), calibration, adapter=adapter)
        assert details(made)["rounds"] == rounds
        left[rounds] = {name: made.factors[name].error_after for name in FIRST}
    assert all(left[2][name] < 0.99 * left[1][name] for name in FIRST)


def test_a_round_that_leaves_more_is_not_kept(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    """Without a search for scales, W − BA is harder to round at 2 bits than W is."""
    once, twice = (
        quantize(two_layers, tmp_path / str(rounds), gptq(), calibration, adapter=EoRA(rank=16, rounds=rounds))
        for rounds in (1, 2)
    )
    assert [twice.factors[name].error_after for name in FIRST] == [once.factors[name].error_after for name in FIRST]


def test_nothing_asked_is_the_balanced_preset(
    two_layers: Path, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = quantize(two_layers, tmp_path / "model", gptq(), calibration, adapter=EoRA())
    shapes = [ModuleShape(name, one.out_features, one.in_features) for name, one in made.factors.items()]
    report = details(made)
    assert report["allocation"]["budget"] == budget_bytes(DEFAULT_BUDGET, shapes)
    assert report["allocation"]["sensitivity"] == "fisher" and report["rounds"] == 1
    assert report["factor_bits"] == PRESETS["balanced"].factor_bits == 4
    assert 0.8 * report["allocation"]["budget"] < sum(one.nbytes for one in made.factors.values())


def test_best_keeps_the_budget_over_its_rounds(
    two_layers: Path, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = quantize(two_layers, tmp_path / "model", gptq(), calibration, adapter=EoRA(preset="best", budget="0.25bpw"))
    report = details(made)
    spent = sum(one.nbytes for one in made.factors.values())
    assert report["rounds"] == PRESETS["best"].rounds > 1
    assert spent == report["allocation"]["spent"] <= report["allocation"]["budget"]


def test_fast_gives_all_the_rank_that_fits(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    made = quantize(two_layers, tmp_path, gptq(), calibration, adapter=EoRA(preset="fast", budget="0.25bpw"))
    shapes = [ModuleShape(name, one.out_features, one.in_features) for name, one in made.factors.items()]
    (rank,) = {one.rank for one in made.factors.values()}
    budget = budget_bytes("0.25bpw", shapes)
    assert sum(factor_bytes(rank, shape, 4) for shape in shapes) <= budget
    assert sum(factor_bytes(rank + 1, shape, 4) for shape in shapes) > budget


def test_what_is_asked_comes_before_the_preset() -> None:
    adapter = EoRA(rank=8, preset="best", factor_bits=8)
    assert (adapter.rank, adapter.factor_bits, adapter.rounds) == (8, 8, PRESETS["best"].rounds)
    again = EoRA(**{key: value for key, value in adapter.to_dict().items() if key != "name"})
    assert again.to_dict() == adapter.to_dict()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RTNConfig(bits=4, group_size=64), "only GPTQ quantises a module by itself"),
        (QuantizeConfig(bits=4, group_size=64, gptaq=GPTAQConfig()), "GPTAQ and FOEM keep sums"),
    ],
)
def test_rounds_of_other_quantisers_are_refused(
    config: Any, message: str, two_layers: Path, calibration: Batches, tmp_path: Path
) -> None:
    with pytest.raises(NotImplementedError, match=f"rounds=2 is not possible: {message}"):
        quantize(two_layers, tmp_path, config, calibration, adapter=EoRA(rank=4, rounds=2))


def test_a_preset_makes_one_round_where_more_are_not_possible() -> None:
    assert rounds_to_make(EoRA(preset="best"), "nothing to do again") == 1
