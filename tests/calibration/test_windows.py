"""Calibration text from files, and its cutting into windows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptqmodel_eora_ext.calibration import mixed_windows, read_texts, windows


class Words:
    """A tokenizer of one token a word."""

    eos_token_id = 0

    def __call__(self, text: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[len(word) for word in text.split()])


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two")
    assert list(read_texts(str(tmp_path / "a.txt"))) == ["one two"]


@pytest.mark.parametrize("column", ["text", "content", "prompt"])
def test_json_lines(tmp_path: Path, column: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({column: word, "id": 1}) + "\n" for word in ("one", "two")))
    assert list(read_texts(str(path))) == ["one", "two"]


def test_no_text_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"has the columns \['body'\]; expected one of"):
        list(read_texts(str(tmp_path / "a.jsonl")))


def test_missing_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="is empty"):
        read_texts(str(tmp_path / "empty.txt"))
    for missing in (str(tmp_path / "no.txt"), "no.jsonl", str(tmp_path)):
        with pytest.raises(ValueError, match="there is no file"):
            read_texts(missing)


def test_windows_join_documents() -> None:
    cut = windows(["a bb", "ccc dddd eeeee"], Words(), samples=9, seqlen=3)
    assert [row["input_ids"] for row in cut] == [[1, 2, 0], [3, 4, 5]]
    assert windows(["a bb ccc"] * 9, Words(), samples=2, seqlen=4)[1]["attention_mask"] == [1] * 4


def test_too_little_text() -> None:
    with pytest.raises(ValueError, match="3 tokens do not fill one window of 8"):
        windows(["a b"], Words(), seqlen=8)


def test_half_of_the_windows_are_the_tasks_spread_evenly() -> None:
    general, task = ["a " * 100], ["bb " * 100]
    mixed = mixed_windows(general, task, Words(), samples=6, seqlen=10)
    assert [window["input_ids"][0] for window in mixed] == [1, 2, 1, 2, 1, 2]
    few = mixed_windows(general, ["bb " * 10], Words(), samples=5, seqlen=10)
    assert [window["input_ids"][0] for window in few].count(2) == 1 and len(few) == 5
    assert mixed_windows(general, None, Words(), samples=3, seqlen=10) == windows(
        general, Words(), samples=3, seqlen=10
    )
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.0"):
        mixed_windows(general, task, Words(), task_share=1.0)
