"""AutoRound by the command, and plans in its loop: widths through its own per-layer configuration, ranks ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round.algorithms.composer import AlgorithmComposer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gptqmodel_eora_ext import EoRAConfig, Plan
from gptqmodel_eora_ext.calibration import read_texts, windows
from gptqmodel_eora_ext.cli import app
from gptqmodel_eora_ext.evaluate.demo import demo_text
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.plan import ModulePlan, PlanError

from .helpers import Batches, kernels, load, measured_errors
from .test_autoround import autoround, random_model

pytestmark = pytest.mark.e2e

GROUP_SIZE = 32
BITS, RANKS = (2, 3, 4), (0, 8, 24)
SHORT = ["--samples", "8", "--seqlen", "64", "--iters", "2", "--quantizer", "autoround"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return random_model(tmp_path_factory.mktemp("tiny"), tokenizer, layers=2)


@pytest.fixture(scope="module")
def plan(tiny: Path) -> Plan:
    """Every width and every rank, modules that share an input among them."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    linears = [(name, one) for name, one in model.model.named_modules() if isinstance(one, torch.nn.Linear)]
    modules = {
        f"model.{name}": ModulePlan(one.out_features, one.in_features, BITS[i % 3], RANKS[(i + i // 3) % 3])
        for i, (name, one) in enumerate(linears)
    }
    return Plan("tiny", "fisher", GROUP_SIZE, True, 2.4, 4, 100_000, 10_000, 1.0, modules)


def run(model: Path, out: Path, *more: str) -> Any:
    arguments = ["quantize", str(model), str(out), "--calibration", str(demo_text("calibration")), *SHORT, *more]
    return CliRunner().invoke(app, arguments)


def test_the_command_runs_a_plan(plan: Plan, tiny: Path, tmp_path: Path) -> None:
    plan.write(tmp_path / "plan.json")
    result = run(tiny, tmp_path / "out", "--plan", str(tmp_path / "plan.json"))
    assert result.exit_code == 0, result.output
    assert "was planned for gptq, and autoround runs it" in " ".join(result.output.split())
    model = load(tmp_path / "out")
    loaded = kernels(model)
    assert set(loaded) == set(plan.modules)
    for name, one in plan.modules.items():
        assert loaded[name].bits == one.bits
        assert (loaded[name].adapter.rank if loaded[name].adapter.lora_A is not None else 0) == one.rank
    told = json.loads((tmp_path / "out/eora/eora.json").read_text())["modules"]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    seen = windows(read_texts(str(demo_text("calibration"))), tokenizer, samples=8, seqlen=64)
    errors = measured_errors(tiny, model, seen)
    for name in plan.modules:
        assert errors[name] == pytest.approx(told[name]["error_after"], rel=0.1)


def test_widths_that_autoround_was_not_given_are_refused_before_work(
    plan: Plan, tiny: Path, tokenizer: Any, calibration: Batches
) -> None:
    def quantize(changed: Plan, **options: Any) -> Callable[[], Any]:
        given = {**plan.autoround_config(), **options}
        rounder: Any = autoround(tiny, tokenizer, calibration, ["signround", EoRAConfig(plan=changed)], **given)
        return lambda: rounder.quantize()

    name = next(name for name, one in plan.modules.items() if one.bits != plan.bits)
    other = {**plan.modules, name: replace(plan.modules[name], out_features=7)}
    fewer = {key: one for key, one in plan.modules.items() if key != name}
    with quiet():
        for refused, message in (
            (quantize(plan, layer_config=None),
             rf"{name}: AutoRound would quantise it by .* = \({plan.bits}, 32, True\), the plan says "
             rf"\({plan.modules[name].bits}, 32, True\). Pass the plan's widths"),
            (quantize(plan, group_size=64), r"= \(2, 64, True\)"),
            (quantize(replace(plan, modules=other)), rf"{name}: the plan for `tiny` expects 7 × "),
            (quantize(replace(plan, modules=fewer)), rf"the model also has {name}"),
        ):  # fmt: skip
            with pytest.raises(PlanError, match=message):
                refused()


def test_a_plan_without_adapters_is_quantised_without_any(
    plan: Plan, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its progress is told in lines of their own, which no bar of AutoRound's shares."""
    without = {name: replace(one, rank=0) for name, one in plan.modules.items()}
    bare = replace(plan, quantizer="autoround", modules=without)
    bare.write(tmp_path / "plan.json")
    result = run(tiny, tmp_path / "out", "--plan", str(tmp_path / "plan.json"), "--log-json")
    assert result.exit_code == 0, result.output
    assert "was planned for" not in result.output
    told = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith('{"time"')]
    assert [one["done"] for one in told if one.get("what") == "quantising layers"] == [1, 2]
    assert not (tmp_path / "out/eora").exists()
    loaded = kernels(load(tmp_path / "out"))
    assert {name: one.bits for name, one in loaded.items()} == {name: one.bits for name, one in plan.modules.items()}


def test_one_rank_for_all_under_a_budget(tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, tmp_path / "out", "--preset", "fast", "--budget", "1bpw", "--group-size", "32")
    assert result.exit_code == 0, result.output
    details = json.loads((tmp_path / "out/eora/eora.json").read_text())
    assert {one["rank"] for one in details["modules"].values()} == {details["rank"]} and details["rank"] > 1


def test_what_autoround_made_is_refined(tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, tmp_path / "out", "--rank", "8", "--group-size", "32", "--refine", "2560")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "out/eora-refined/eora.json").read_text())["refinement"]
    assert told["tokens"] == 2560 and told["steps"] == 4 and told["after"] <= told["before"]
    named = json.loads((tmp_path / "out/quantize_config.json").read_text())["adapter"]["path"]
    assert named == "eora-refined"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mse", "2.4"], "--mse is of --quantizer gptq, got --quantizer autoround"),
        (["--rounds", "2"], "--rounds is of --quantizer gptq"),
        (["--preset", "best"], "3 rounds are asked by the preset best"),
        (["--format", "gguf"], "--format must be one of auto_round"),
        (["--format", "auto_awq"], "--bits must be one of 4 in the format auto_awq, got 2"),
        (["--quantizer", "gptq"], "--iters is of --quantizer autoround, got --quantizer gptq"),
        (["--quantizer", "rtn"], "--quantizer must be one of gptq, autoround"),
    ],
)
def test_options_that_do_not_go_together(more: list[str], message: str, tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, tmp_path / "out", *more)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_plan_beside_a_rank_is_refused(plan: Plan) -> None:
    with pytest.raises(ValueError, match="`plan` names the ranks"):
        EoRAConfig(rank=8, plan=plan)


def test_an_interrupted_run_does_not_go_on_by_another_plan(
    plan: Plan, tiny: Path, tokenizer: Any, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(followed: Plan) -> None:
        rounder: Any = autoround(
            tiny, tokenizer, calibration, ["signround", EoRAConfig(plan=followed)], **plan.autoround_config()
        )
        with quiet():
            rounder.quantize_and_save(str(tmp_path / "out"), format="auto_round")

    def interrupted(self: Any, block: Any, inputs: Any, others: Any, block_ctx: Any, **kwargs: Any) -> Any:
        if block_ctx.block_index == 1:
            raise KeyboardInterrupt
        return compress(self, block, inputs, others, block_ctx, **kwargs)

    compress = AlgorithmComposer.compress_block
    monkeypatch.setenv("AR_RESUME_DIR", str(tmp_path / "progress"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AlgorithmComposer, "compress_block", interrupted)
        run(plan)
    name = next(name for name, one in plan.modules.items() if 0 < one.rank < plan.largest_rank)
    changed = {**plan.modules, name: replace(plan.modules[name], rank=plan.modules[name].rank - 1)}
    with pytest.raises(ValueError, match=r"was asked something else \(adapter\.ranks\."):
        run(replace(plan, modules=changed))
