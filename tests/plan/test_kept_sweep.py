"""A survey that is interrupted again and again finds what one finds that is not, and does no layer twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.plan import kept_sweep
from gptqmodel_eora_ext.plan.survey import survey
from gptqmodel_eora_ext.plan.sweep import Question, Rounding, Swept
from gptqmodel_eora_ext.solve import Grid

from ..processes import run
from .helpers import in_memory, linears, tiny_model, windows

QUESTION = Question(lambda name: Rounding((2, 3), Grid(16)), lambda name, bits: 6, uniform=2)


def surveyed(bar: Any = lambda title: iter, kind: str = "fisher", question: Question = QUESTION) -> Swept:
    model = in_memory(tiny_model())
    return survey(model, list(linears(tiny_model())), windows(3), question, kind=kind, with_kinds=True, bar=bar)


def same(one: Swept, other: Swept) -> bool:
    assert list(one.forecasts) == list(other.forecasts)
    for name, widths in one.forecasts.items():
        for bits, forecast in widths.items():
            found = other.forecasts[name][bits]
            if (forecast.total, forecast.correction) != (found.total, found.correction):
                return False
            if not torch.equal(forecast.gains, found.gains):
                return False
    return (one.divergences, one.tokens, one.reached) == (other.divergences, other.tokens, other.reached)


@pytest.mark.parametrize("kind", ["fisher", "relative"])
def test_goes_on_layer_by_layer(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "whole"))
    whole = surveyed(kind=kind)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "interrupted"))
    done: list[tuple[str, int]] = []

    def one_step(title: str) -> Any:
        def wrap(items: Any) -> Any:
            for item in items:
                done.append((title, item))
                yield item
                raise KeyboardInterrupt

        return wrap

    interruptions = 0
    while True:
        try:
            found = surveyed(one_step, kind)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert same(whole, found) and len(set(done)) == len(done) == interruptions
    if kind == "relative":
        assert all(torch.equal(found.output_moments[name], one) for name, one in whole.output_moments.items())
    # What was found stays, and nothing else: a run that was killed later on asks again.
    [root] = (tmp_path / "interrupted" / "gptqmodel-eora-ext" / kept_sweep.FOLDER).iterdir()
    assert {file.name for file in root.iterdir()} == {"found.safetensors", "lock", "run.json"}
    assert same(whole, surveyed(lambda title: pytest.fail("nothing is measured again"), kind))


@pytest.mark.usefixtures("one_thread")
def test_one_process_goes_on_with_what_two_have_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "whole"))
    whole = surveyed(kind="relative")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "interrupted"))
    ended = run(["-m", "tests.plan.survey_together"], 2)
    assert [one.status for one in ended] == [0, 0], ended
    layers: list[int] = []

    def noted(title: str) -> Any:
        def wrap(items: Any) -> Any:
            for item in items:
                layers.append(item)
                yield item

        return wrap

    assert same(whole, surveyed(noted, "relative"))
    assert layers[0] == 1


def test_another_question_begins_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = surveyed(), surveyed(question=replace(QUESTION, uniform=1))
    assert not same(first, second)
    known = replace(QUESTION, rounding=lambda name: Rounding((2,), Grid(16)),
                    quantized=lambda name, weight, moment: weight * 0.5)  # fmt: skip
    # Weights that somebody else has rounded are not told apart unless they are named.
    before = len(list((tmp_path / "gptqmodel-eora-ext" / kept_sweep.FOLDER).iterdir()))
    surveyed(question=known)
    assert len(list((tmp_path / "gptqmodel-eora-ext" / kept_sweep.FOLDER).iterdir())) == before
    surveyed(question=replace(known, source="halved"))
    assert len(list((tmp_path / "gptqmodel-eora-ext" / kept_sweep.FOLDER).iterdir())) == before + 1
