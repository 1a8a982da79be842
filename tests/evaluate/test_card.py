"""The model card: its front matter, its licence, and that nobody's words are lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gptqmodel_eora_ext import cli
from gptqmodel_eora_ext.evaluate.card import CARD, FRONT_MATTER, MARK
from gptqmodel_eora_ext.evaluate.outcome import comparisons
from gptqmodel_eora_ext.evaluate.record import write_record
from tests.adapter.test_folder import write
from tests.evaluate.records import record

runner = CliRunner()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of a base that lies beside it, with a card of its own."""
    base = tmp_path / "base"
    base.mkdir()
    (base / CARD).write_text("---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n# The base\n")
    folder = tmp_path / "r4"
    write(folder, calibration={"tokens": 8192, "sha256": "abc"}, versions={"gptqmodel": "7.7.0"}, method="gptq")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    return folder


def card(folder: Path, *arguments: str) -> Any:
    return runner.invoke(cli.app, ["card", str(folder), *arguments])


def matter(folder: Path) -> dict[str, Any]:
    text = (folder / CARD).read_text()
    found = FRONT_MATTER.search(text)
    assert found is not None and text.startswith("---\n")
    return yaml.safe_load(found[1])  # type: ignore[no-any-return]


def test_front_matter_and_loading(adapter: Path) -> None:
    result = card(adapter, "--base-model", "Qwen/Qwen3-8B")
    assert result.exit_code == 0, result.output
    assert "no table of results" in " ".join(result.output.split())
    found = matter(adapter)
    assert found == {
        "base_model": "Qwen/Qwen3-8B", "base_model_relation": "adapter", "library_name": "peft", "license": "other",
        "license_name": "qwen", "license_link": "LICENSE", "tags": ["eora", "lora", "gptq"],
    }  # fmt: skip
    text = (adapter / CARD).read_text()
    for expected in ("GPTQModel.load(", "Lora(path=", "PeftModel.from_pretrained(", "vllm serve", "8192 tokens"):
        assert expected in text


def test_python_in_the_card_is_python(adapter: Path) -> None:
    card(adapter, "--base-model", "Qwen/Qwen3-8B")
    blocks = (adapter / CARD).read_text().split("```python\n")[1:]
    assert len(blocks) == 3
    for block in blocks:
        compile(block.split("```")[0], "card", "exec")


def test_table_is_the_records(adapter: Path, tmp_path: Path) -> None:
    write_record(tmp_path / "report.json", record())
    result = card(adapter, "--base-model", "a/b", "--data", str(tmp_path / "report.json"), "--license", "mit")
    assert result.exit_code == 0 and matter(adapter)["license"] == "mit"
    text = (adapter / CARD).read_text()
    assert "| planned <mix> + EoRA | 100.4 MB |" in text
    assert all(one.sentence in text for one in comparisons(record()))


def test_nobodys_card_is_lost(adapter: Path) -> None:
    (adapter / CARD).write_text("# Mine\n")
    refused = card(adapter, "--base-model", "a/b")
    assert refused.exit_code == 2 and "was written by somebody else. Pass --force" in " ".join(refused.output.split())
    assert (adapter / CARD).read_text() == "# Mine\n"
    assert card(adapter, "--base-model", "a/b", "--force").exit_code == 0
    assert MARK in (adapter / CARD).read_text()
    # One of its own is replaced without being asked.
    assert card(adapter, "--base-model", "c/d").exit_code == 0 and matter(adapter)["base_model"] == "c/d"


def test_refusals(adapter: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((), "needs the hub name of the base model"),
        (("--base-model", "just-a-name"), "expected the form OWNER/NAME"),
        (("--base-model", "a/b", "--data", str(tmp_path / "no.json")), "cannot be read"),
    ):
        result = card(adapter, *arguments)
        assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (adapter / CARD).exists()
    assert "neither an adapter" in " ".join(card(tmp_path, "--base-model", "a/b").output.split())
    (tmp_path / "base" / CARD).unlink()
    result = card(adapter, "--base-model", "a/b")
    assert result.exit_code == 0 and "names no licence" in " ".join(result.output.split())
    assert "license" not in matter(adapter)
