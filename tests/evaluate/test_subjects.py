"""Which models a command means, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gptqmodel_eora_ext import cli
from gptqmodel_eora_ext.evaluate.subjects import ADAPTED, FULL_PRECISION, QUANTISED, resolve
from gptqmodel_eora_ext.evaluate.tasks import check_padding
from tests.adapter.test_folder import write

runner = CliRunner()


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """A model, a quantised checkpoint of it, one that names its adapter, and an adapter alone."""
    found = {name: tmp_path / name for name in ("base", "plain", "named", "r4")}
    for name in ("base", "plain", "named"):
        found[name].mkdir()
        (found[name] / "config.json").write_text(json.dumps({"max_position_embeddings": 256}))
    for name in ("plain", "named"):
        config: dict[str, Any] = {"bits": 3, "group_size": 64}
        if name == "named":
            config["adapter"] = {"name": "lora", "path": "eora", "rank": 4}
            write(found[name] / "eora")
        (found[name] / "quantize_config.json").write_text(json.dumps(config))
    write(found["r4"])
    return found


def test_what_is_meant(places: dict[str, Path]) -> None:
    base, plain, named, r4 = (str(places[name]) for name in ("base", "plain", "named", "r4"))
    found = resolve([plain, r4, f"mine={r4}", named], base=f"Smol={base}")
    assert [(one.name, one.kind) for one in found] == [
        ("Smol", FULL_PRECISION),
        ("plain", QUANTISED),
        ("plain + r4", ADAPTED),
        ("mine", ADAPTED),
        ("named", QUANTISED),
        ("named + eora", ADAPTED),
    ]
    assert [one.model for one in found[1:4]] == [plain] * 3
    assert [one.name for one in resolve([f"mix={named}"], adapters_only=True)] == ["mix"]
    assert [one.name for one in resolve([named], adapters=[places["r4"]])] == ["named", "named + r4"]
    assert [one.kind for one in resolve([base], base=base)] == [FULL_PRECISION]
    assert resolve([plain], base="Qwen/Qwen3-8B")[0].model == "Qwen/Qwen3-8B"


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        (["{r4}"], {}, "is an adapter; name the quantised checkpoint that it is for before it"),
        (["{base}", "{r4}"], {}, "is an adapter; name the quantised checkpoint"),
        (["{base}"], {"adapters": ["{r4}"]}, "is not quantised, and an adapter corrects"),
        (["{tmp}/nowhere"], {}, "has no config.json; it is no checkpoint folder"),
        (["{plain}"], {"base": "{named}"}, "is quantised; name the full-precision model"),
        (["{plain}", "{plain}"], {}, "is named twice"),
    ],
)
def test_refusals(
    paths: list[str], options: dict[str, Any], message: str, places: dict[str, Path], tmp_path: Path
) -> None:
    names = {**places, "tmp": tmp_path}
    options = {
        key: value.format(**names) if isinstance(value, str) else [Path(one.format(**names)) for one in value]
        for key, value in options.items()
    }
    with pytest.raises(ValueError, match=message):
        resolve([path.format(**names) for path in paths], **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate: name a --text"),
        (["--text", "{text}", "--window", "512"], "config.json`: the model reads 256 tokens at most"),
        (["--text", "{text}", "--window", "64", "--stride", "65"], "the stride is 65, expected 1 to 64"),
        (["--items", "{text}"], "is text; expected JSON lines"),
        (["--task", "gsm8k={items}"], "line 1: `answer` ends without"),
        (["--task", "mmlu={items}"], "given for the task `mmlu`"),
        (["--items", "{empty}"], "is empty"),
        (["--items", "{items}", "--items", "{items}"], "is asked for twice"),
        (["--text", "{text}", "--out", "{tmp}"], "is a folder; name a file"),
        (["--text", "{tmp}/none.txt"], "there is no file"),
    ],
)
def test_eval_refuses(arguments: list[str], message: str, places: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "items.jsonl").write_text('{"question": "Who?", "answer": "Emma"}\n')
    names = {"tmp": tmp_path, "text": tmp_path / "text.txt", "empty": tmp_path / "empty.jsonl",
             "items": tmp_path / "items.jsonl"}  # fmt: skip
    asked = [argument.format(**names) for argument in arguments]
    result = runner.invoke(cli.app, ["eval", str(places["base"]), *asked])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_a_tokenizer_without_anything_to_pad_with() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match=r"`a/model/tokenizer_config\.json` names no pad_token"):
        check_padding(bare, "a/model")
    bare.eos_token = "a"
    check_padding(bare, "a/model")
