"""The command: help that works, and mistakes that end before a model is loaded."""

from __future__ import annotations

import ast
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gptqmodel_eora_ext import __version__, cli
from tests.adapter.test_folder import NAMES, write

COMMANDS = ["quantize", "prune", "generate", "refine", "imatrix", "plan", "export", "inspect", "eval", "report", "card",
            "study", "demo"]  # fmt: skip
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
        (["--method", "obs"], "--method must be one of sparsegpt, wanda, magnitude, got 'obs'"),
        (["--pattern", "4:2"], '--pattern must be "2:4"'),
        (["--pattern", "150%"], '--pattern must be "2:4"'),
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--bits", "5", "--rank", "8"], "--bits must be one of 2, 3, 4, 8, got 5"),
        (["--bits", "4", "--method", "wanda", "--rank", "8"], "--bits quantises as SparseGPT prunes"),
        (["--group-size", "32", "--rank", "8"], "Pass --bits as well"),
        (["--no-adapter", "--rank", "8"], "--no-adapter makes no adapter, and --rank says"),
        (["--rank", "8", "--force"], "which is read from and must stay as it is"),
    ],
)
def test_prune_refuses(arguments: list[str], message: str, model: Path, text: Path, tmp_path: Path) -> None:
    out = model if "--force" in arguments else tmp_path / "out"
    result = runner.invoke(cli.app, ["prune", str(model), str(out), "--calibration", str(text), *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


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
        (["{model}", "{model}", "--calibration", "{text}"], "which is read from and must stay as it is"),
        (["{model}", "{full}", "--calibration", "{text}"], "is not empty"),
        (["{model}", "{text}", "--calibration", "{text}"], "is a file; pass a folder"),
        (["{model}", "{out}", "--calibration", "{text}", "--plan", "{text}"], "is no plan"),
        (["{model}", "{out}", "--calibration", "{text}", "--plan", "p", "--bits", "3"], "--plan says what --bits says"),
    ],
)
def test_quantize_refuses(arguments: list[str], message: str, model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    places = {"model": model, "text": text, "out": tmp_path / "out", "tmp": tmp_path, "full": tmp_path / "full"}
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


def test_what_looks_like_markup_is_printed_as_it_is(tmp_path: Path) -> None:
    for name in ("no[en]such", "no[/b]such", "no:smile:such"):
        result = runner.invoke(cli.app, ["inspect", str(tmp_path / name)])
        assert result.exit_code == 2 and name in result.output
    write(tmp_path / "out[en]", method="[/x]", objective="[red]eora", versions={"[/y]": "1"})
    result = runner.invoke(cli.app, ["inspect", str(tmp_path / "out[en]"), "--modules"])
    assert result.exit_code == 0
    for shown in ("[en]", "[/x]", "[red]eora", "[/y]1"):
        assert shown in "".join(result.output.split())


def test_nothing_else_prints() -> None:
    """Another console, or rich's own print, would read brackets in a path as markup."""
    places = {path.name: path.read_text(encoding="utf-8") for path in Path(cli.__file__).parent.glob("*.py")}
    for name, source in places.items():
        calls = [
            node for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]  # fmt: skip
        found = {call.func.id for call in calls} & {"Console", "print", "TextColumn"}  # type: ignore[attr-defined]
        # JSON lines, and what a process tells whose consoles are silent, are printed as they are.
        assert found <= ({"Console", "TextColumn", "print"} if name == "printing.py" else set()), name


@pytest.mark.parametrize("place", ["{model}", "{model}/q", "{tmp}", "{tmp}/link", "{tmp}/link/q"])
def test_the_base_is_never_written_over(place: str, model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    out = place.format(model=model, tmp=tmp_path)
    for command in (["quantize", str(model), out, "--force"], ["study", str(model), out, "--text", str(text)],
                    ["generate", str(model), out] if place.endswith("link") else None):  # fmt: skip
        if command is not None:
            result = runner.invoke(cli.app, [*command, "--calibration", str(text)])
            assert result.exit_code == 2
            assert "which is read from and must stay as it is" in " ".join(result.output.split())


def test_an_adapter_is_not_exported_over_itself(tmp_path: Path) -> None:
    write(tmp_path / "a")
    result = runner.invoke(cli.app, ["export", str(tmp_path / "a"), "--peft", str(tmp_path / "a"), "--force"])
    assert result.exit_code == 2 and "is what is read from" in " ".join(result.output.split())


def test_what_the_system_refuses_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path / "a")
    monkeypatch.setattr(import_module("gptqmodel_eora_ext.cli.export"), "export_peft", full)
    result = runner.invoke(cli.app, ["export", str(tmp_path / "a"), "--peft", str(tmp_path / "b")])
    assert result.exit_code == 1 and "error: [Errno 28] No space left on device" in result.output


@pytest.mark.parametrize(("content", "message"), [(b"\x1f\x8bnone", "is damaged"), (b"a\n\xff", "line 2: byte 0xff")])
def test_texts_are_read_by_one_reader(content: bytes, message: str, model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "text.txt"
    broken.write_bytes(content)
    for command in (["eval", str(model), "--text"], ["study", str(model), str(tmp_path / "s"), "--text"],
                    ["quantize", str(model), str(tmp_path / "q"), "--calibration"]):  # fmt: skip
        more = ["--calibration", str(broken)] if command[0] == "study" else []
        result = runner.invoke(cli.app, [*command, str(broken), *more])
        assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_eval_of_a_model_at_full_precision(two_layers: Path, smollm2: Path, tmp_path: Path) -> None:
    from gptqmodel_eora_ext.evaluate.demo import demo_text

    asked = ["eval", str(two_layers), "--text", str(demo_text("heldout")), "--window", "64", "--max-windows", "2"]
    result = runner.invoke(cli.app, [*asked, "--json"])
    assert result.exit_code == 0
    [row] = json.loads(result.stdout)
    assert row["kind"] == "full precision" and row["tokens"] == 2 * 63
    write(tmp_path / "a")
    result = runner.invoke(cli.app, [*asked, "--adapter", str(tmp_path / "a")])
    assert result.exit_code == 2 and "is not quantised" in " ".join(result.output.split())
