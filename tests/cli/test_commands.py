"""The command: help that works, and mistakes that end before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptqmodel_eora_ext import __version__, cli
from tests.adapter.test_folder import NAMES, write

COMMANDS = ["quantize", "generate", "plan", "export", "inspect", "eval", "study", "demo"]
runner = CliRunner()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("some words")
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    result = runner.invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert f"eora {command}" in " ".join(result.output.split())


def test_version() -> None:
    assert runner.invoke(cli.app, ["--version"]).output.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "{out}", "--calibration", "{text}", "--rank", "0"], "--rank must be at least 1, got 0"),
        (["{model}", "{out}", "--calibration", "{text}", "--rank", "8", "--budget", "1MB"], "exclude each other"),
        (["{model}", "{out}", "--calibration", "{text}", "--budget", "much"], "must be a positive number of bytes"),
        (["{model}", "{out}", "--calibration", "{text}", "--sensitivity", "x"], "must be one of fisher, empirical"),
        (["{model}", "{out}", "--calibration", "{text}", "--factor-bits", "3"], "must be one of 16, 8, 4, got 3"),
        (["{model}", "{out}", "--calibration", "{text}", "--objective", "x"], "must be one of eora, svd"),
        (["{model}", "{out}", "--calibration", "{text}", "--bits", "5"], "--bits must be one of 2, 3, 4, 8, got 5"),
        (["{model}", "{out}", "--calibration", "{text}", "--group-size", "48"], "--group-size must be one of"),
        (["{model}", "{out}", "--calibration", "{tmp}/missing.txt"], "there is no file"),
        (["{tmp}/nowhere", "{out}", "--calibration", "{text}"], "there is no model folder"),
        (["{tmp}", "{out}", "--calibration", "{text}"], "has no config.json"),
        (["{model}", "{model}", "--calibration", "{text}"], "is not empty"),
        (["{model}", "{text}", "--calibration", "{text}"], "is a file; pass a folder"),
        (["{model}", "{out}", "--calibration", "{text}", "--plan", "{text}"], "is no plan"),
        (["{model}", "{out}", "--calibration", "{text}", "--plan", "p", "--bits", "3"], "--plan says what --bits says"),
    ],
)
def test_quantize_refuses(arguments: list[str], message: str, model: Path, text: Path, tmp_path: Path) -> None:
    places = {"model": model, "text": text, "out": tmp_path / "out", "tmp": tmp_path}
    result = runner.invoke(cli.app, ["quantize", *(argument.format(**places) for argument in arguments)])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--total", "much"], "must be a positive number of bytes"),
        (["--out", "plan.json"], "--out writes the plan of a --total"),
        (["--total", "2.5bpw", "--json"], "name a file for the plan by --out"),
        (["--picture", "nowhere/plan.svg"], "there is no folder `nowhere` to write `plan.svg` into"),
        (["--picture", "plan.doc"], "--picture must end in .svg, .png or .pdf"),
        (["--factor-bits", "5"], "must be one of 16, 8, 4, got 5"),
        (["--budget", "-1"], "must be a positive number of bytes"),
    ],
)
def test_plan_refuses(arguments: list[str], message: str, model: Path, text: Path) -> None:
    result = runner.invoke(cli.app, ["plan", str(model), "--calibration", str(text), *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_generate_and_eval_refuse(model: Path, text: Path, tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["generate", str(model), str(tmp_path / "no"), "--calibration", str(text)])
    assert result.exit_code == 2 and "is no checkpoint folder" in " ".join(result.output.split())
    result = runner.invoke(cli.app, ["eval", str(model), "--text", str(tmp_path / "no.txt")])
    assert result.exit_code == 2 and "there is no file" in " ".join(result.output.split())
    result = runner.invoke(cli.app, ["inspect", str(model)])
    assert result.exit_code == 2 and "neither an adapter" in " ".join(result.output.split())


def test_export(tmp_path: Path) -> None:
    write(tmp_path / "a")
    result = runner.invoke(cli.app, ["export", str(tmp_path / "a"), "--peft", str(tmp_path / "plain")])
    assert result.exit_code == 0 and "factors in 16 bits" in " ".join(result.output.split())
    again = runner.invoke(cli.app, ["export", str(tmp_path / "a"), "--peft", str(tmp_path / "plain")])
    assert again.exit_code == 2 and "is not empty" in " ".join(again.output.split())
    none = runner.invoke(cli.app, ["export", str(tmp_path), "--peft", str(tmp_path / "other")])
    assert none.exit_code == 2 and "neither an adapter" in " ".join(none.output.split())


def test_inspect(tmp_path: Path) -> None:
    write(tmp_path, calibration={"tokens": 8192, "sha256": "abc"}, versions={"gptqmodel": "7.7.0"}, method="gptq")
    result = runner.invoke(cli.app, ["inspect", str(tmp_path), "--modules"])
    shown = " ".join(result.output.split())
    assert result.exit_code == 0
    for expected in ("8192 tokens", "gptqmodel 7.7.0", "25.0% of the weighted error", "10.00%", "2.50%"):
        assert expected in shown
    content = json.loads(runner.invoke(cli.app, ["inspect", str(tmp_path), "--json"]).output)
    assert content["ranks"] == dict(zip(NAMES, (4, 4, 2), strict=True))
    assert content["modules"][NAMES[0]]["error_after"] == 0.25
