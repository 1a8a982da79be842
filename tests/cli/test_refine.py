"""`eora refine` and `--refine`: mistakes that end before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptqmodel_eora_ext import cli

runner = CliRunner()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["refine", "{tmp}/out", "--tokens", "some"], "--tokens must be a number such as 160000"),
        (["refine", "{tmp}/out", "--tokens", "1k"], "--tokens must fill at least 5 windows of 512"),
        (["refine", "{tmp}/out", "--loss", "mse"], "--loss must be one of kl, rilq"),
        (["refine", "{tmp}/out", "--learning-rate", "-1"], "--learning-rate must be a number above 0"),
        (["refine", "{tmp}/out", "--loss", "natural", "--passes", "2"], "--passes has no meaning with the loss"),
        (["refine", "{tmp}/nothing"], "has no config.json"),
        (["refine", "{tmp}/out"], "is neither an adapter"),
        (["refine", "{tmp}/out", "--adapter", "{tmp}/text.txt"], "is neither an adapter"),
        (["quantize", "{tmp}/base", "{tmp}/new", "--refine", "x"], "--refine must be a number such as 160000"),
        (["generate", "{tmp}/base", "{tmp}/out", "--refine", "100"], "--refine must fill at least 5 windows"),
    ],
)
def test_mistakes_are_told_first(tmp_path: Path, arguments: list[str], message: str) -> None:
    for name in ("base", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("some words")
    given = [one.format(tmp=tmp_path) for one in arguments]
    given += ["--calibration", str(tmp_path / "text.txt")]
    if given[0] == "refine":
        given += ["--base", str(tmp_path / "base")]
    result = runner.invoke(cli.app, given)
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
