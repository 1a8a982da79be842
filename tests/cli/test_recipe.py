"""`eora quantize --total`: contradictions and sizes out of reach end before work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gptqmodel_eora_ext import cli
from gptqmodel_eora_ext.cli.recipe import PICKED

runner = CliRunner()
OTHERS: dict[str, list[str]] = {
    "quantizer": ["--quantizer", "gptq"], "bits": ["--bits", "2"], "group_size": ["--group-size", "64"],
    "rank": ["--rank", "8"], "budget": ["--budget", "0.5bpw"], "plan_file": ["--plan", "plan.json"],
    "preset": ["--preset", "best"], "sensitivity": ["--sensitivity", "fisher"], "objective": ["--objective", "eora"],
    "factor_bits": ["--factor-bits", "4"], "rounds": ["--rounds", "2"], "refine": ["--refine", "160k"],
    "sym": ["--no-sym"], "desc_act": ["--desc-act"], "mse": ["--mse", "2.4"], "iters": ["--iters", "10"],
}  # fmt: skip


def invoke(tmp_path: Path, *more: str) -> Any:
    (tmp_path / "base").mkdir(exist_ok=True)
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("some words")
    return runner.invoke(
        cli.app,
        ["quantize", str(tmp_path / "base"), str(tmp_path / "new"), "--calibration", str(tmp_path / "text.txt"), *more],
    )


def assert_told(result: Any, message: str) -> None:
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output


@pytest.mark.parametrize("name", PICKED)
def test_what_a_recipe_picks_is_refused_by_name(tmp_path: Path, name: str) -> None:
    flag = OTHERS[name][0].replace("--no-", "--")
    assert_told(invoke(tmp_path, "--total", "2.75bpw", *OTHERS[name]), f"--total picks what {flag} says")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--effort", "best"], "--effort is of recipes; name a size, for instance --total 2.75bpw"),
        (["--dry-run"], "--dry-run is of recipes"),
        (["--total", "2.75bpw", "--effort", "most"], "--effort must be one of fast, balanced, best"),
        (["--total", "much"], "--total must be a positive number of bytes"),
        (["--total", "2.75bpw", "--format", "gguf"], "--format must be one of"),
        (["--total", "2.75bpw", "--format", "auto_awq"], "must be one of 4 in the format auto_awq"),
    ],
)
def test_mistakes_are_told_first(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert_told(invoke(tmp_path, *arguments), message)
