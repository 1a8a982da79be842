"""Watching: the sequential test's false alarms as stated, and what is counted and written."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from gptqmodel_eora_ext.adapter.ensemble.drift import PIECES, DriftTest
from gptqmodel_eora_ext.adapter.ensemble.router import Routing
from gptqmodel_eora_ext.adapter.ensemble.watch import Watch

MEMBERS = ("math", "code")


def routing(*rows: tuple[list[float], float, bool]) -> Routing:
    weights = torch.tensor([row[0] for row in rows])
    return Routing(weights, ("math",) * len(rows), torch.zeros(len(rows), 2), tuple(row[1] for row in rows),
                   tuple(row[2] for row in rows))  # fmt: skip


@pytest.mark.parametrize("known", [None, PIECES, 256])
def test_false_alarms_are_as_rare_as_stated(known: int | None) -> None:
    """Within N prompts at most N / c, for tails that are uniform, or known by some held-out pieces alone.

    With c smaller than the default, so that there are alarms enough to count.
    """
    rng = random.Random(0)
    threshold, prompts, runs, alarms = 2000.0, 200, 400, 0
    for _ in range(runs):
        held = sorted(rng.random() for _ in range(known or 0))
        test = DriftTest(threshold)
        for _ in range(prompts):
            distance = rng.random()
            tail = sum(one >= 1 - distance for one in held) / known if known else distance
            if test.add(tail):
                alarms += 1
                break
    stated = prompts / threshold
    assert alarms / runs <= stated + 2 * (stated / runs) ** 0.5


def test_traffic_that_moves_away_is_noticed() -> None:
    rng = random.Random(1)
    test = DriftTest()
    assert not any(test.add(rng.random()) for _ in range(2000))
    for _ in range(200):
        if test.add(rng.random() * 0.02):
            break
    assert test.alarm is not None and test.alarm < 2060
    test.reset()
    assert test.alarm is None and not test.add(0.5)


def test_what_is_counted() -> None:
    watch = Watch(MEMBERS)
    watch(routing(([1.0, 0.0], 0.4, False), ([0.0, 0.0], 0.0, True), ([0.5, 0.5], 0.9, False)))
    watch.record_loss("math", 12.0, 4)
    figures = watch.figures()
    assert figures["prompts"] == 3 and figures["fallback"] == pytest.approx(1 / 3)
    assert figures["weights"]["math"]["mean"] == pytest.approx(0.5)
    assert figures["weights"]["math"]["histogram"] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert figures["loss"] == {"math": 3.0}
    assert figures["entropy"] == pytest.approx(0.6931 / 3, abs=1e-4)
    assert figures["drift"]["alarm"] is None


def test_the_report_and_the_prompts(tmp_path: Path) -> None:
    watch = Watch(MEMBERS, report=tmp_path / "report.json", prompts=tmp_path / "prompts.jsonl",
                  decode=lambda ids: f"text of {len(ids)}")  # fmt: skip
    watch(routing(([1.0, 0.0], 0.4, False)), torch.zeros(1, 7))
    assert json.loads((tmp_path / "report.json").read_text())["prompts"] == 1
    (line,) = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert json.loads(line) == {"text": "text of 7", "nearest": "math", "fallen_back": False}


def test_no_text_is_kept_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Watch(MEMBERS)(routing(([1.0, 0.0], 0.4, False)), torch.zeros(1, 7))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="`decode`"):
        Watch(MEMBERS, prompts=tmp_path / "prompts.jsonl")


def test_metrics() -> None:
    prometheus = pytest.importorskip("prometheus_client")
    watch = Watch(MEMBERS, metrics=True)
    watch(routing(([1.0, 0.0], 0.4, False), ([0.0, 0.0], 0.0, True)))
    watch.record_loss("math", 12.0, 4)
    text = prometheus.generate_latest().decode()
    for line in ("eora_ensemble_prompts_total 2.0", "eora_ensemble_fallback_total 1.0",
                 'eora_ensemble_weight_bucket{le="0.1",member="code"} 2.0', 'eora_ensemble_loss{domain="math"} 3.0',
                 "eora_ensemble_alarm 0.0"):  # fmt: skip
        assert line in text
