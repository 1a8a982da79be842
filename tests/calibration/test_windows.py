"""Calibration text from files, and its cutting into windows."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptqmodel_eora_ext.calibration import file_tokens, mixed_windows, read_texts, windows
from gptqmodel_eora_ext.calibration import files as text_files

# The package's function of that name hides the module.
cutting = import_module("gptqmodel_eora_ext.calibration.windows")


class Words:
    """A tokenizer of one token a word."""

    eos_token_id = 0

    def __call__(self, text: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[len(word) for word in text.split()])


def rows(tmp_path: Path, *content: Any) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.mark.parametrize("column", ["text", "content", "prompt"])
def test_columns_of_text(tmp_path: Path, column: str) -> None:
    assert list(read_texts(rows(tmp_path, {column: "one", "id": 1}))) == ["one"]


ASKED, ANSWERED = {"role": "user", "content": "How far?"}, {"role": "assistant", "content": "Two miles."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWERED], "prompt": "How far?"},
        {"conversations": [{"from": "human", "value": "How far?"}, {"from": "gpt", "value": "Two miles."}]},
        {"instruction": "How far?", "input": "", "output": "Two miles."},
    ],
)
def test_conversations_are_written_by_the_chat_template(tmp_path: Path, row: dict[str, Any], tokenizer: Any) -> None:
    [window] = windows(read_texts(rows(tmp_path, row)), tokenizer, samples=1, seqlen=16)
    expected = tokenizer.apply_chat_template([ASKED, ANSWERED], tokenize=False)
    assert window["input_ids"] == tokenizer(expected).input_ids[:16]


def test_without_a_chat_template(tmp_path: Path) -> None:
    alpaca = rows(tmp_path, {"instruction": "a bb", "input": "ccc", "output": "dddd"})
    assert windows(read_texts(alpaca), Words(), seqlen=4)[0]["input_ids"] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"rows\.jsonl`, line 1 is a conversation, and the tokenizer has no chat"):
        windows(read_texts(rows(tmp_path, {"messages": [ASKED]})), Words())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "expected a list of messages"),
        ({"messages": [{"role": "user"}]}, "expected messages with `role` and `content`"),
        ({"conversations": [{"from": "them", "value": "x"}]}, "`from` is 'them', expected one of human"),
        ({"instruction": "a", "output": 5}, "`output` is a int"),
        ({"input_ids": [1, -5]}, r"`input_ids` is \[1, -5\], expected a list of ids of at least 0"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "`attention_mask` has 1 values, `input_ids` 2"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"rows\.jsonl`, line 1.*{message}"):
        list(read_texts(rows(tmp_path, row)))


def test_token_ids_go_as_they_are(tmp_path: Path) -> None:
    path = rows(tmp_path, {"input_ids": [[5, 6, 7]], "attention_mask": [[0, 1, 1]]}, {"input_ids": [8, 9]})
    assert windows(read_texts(path), Words(), seqlen=2) == [
        {"input_ids": [6, 7], "attention_mask": [1, 1]}, {"input_ids": [8, 9], "attention_mask": [1, 1]}
    ]  # fmt: skip


@pytest.mark.parametrize("between", [" ", "\n", ".\n\n", " 12 , "])
def test_chunks_give_the_tokens_of_the_whole_text(
    tmp_path: Path, tokenizer: Any, between: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = between.join(f"river{index} Stone houses" for index in range(400))
    expected = tokenizer(text).input_ids
    monkeypatch.setattr(cutting, "CHUNK_CHARACTERS", 500)
    monkeypatch.setattr(cutting, "SEARCHED_CHARACTERS", 100)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 333)
    (tmp_path / "a.txt").write_text(text)
    assert len(list(read_texts(tmp_path / "a.txt"))) > 10
    assert file_tokens(tmp_path / "a.txt", tokenizer).tolist() == expected
    assert windows(read_texts(tmp_path / "a.txt"), tokenizer, samples=9, seqlen=64)[8]["input_ids"] == expected[512:576]


def test_no_more_is_read_than_windows_need(tmp_path: Path) -> None:
    # What follows the first rows is no text at all.
    path = tmp_path / "a.jsonl"
    path.write_bytes((json.dumps({"text": "word " * 9_000}) + "\n").encode() * 20 + b"\xff" * 99)
    assert len(windows(read_texts(path), Words(), samples=3, seqlen=16)) == 3
    assert len(file_tokens(path, Words(), most=64)) >= 64
    with pytest.raises(ValueError, match="line 21: byte 0xff"):
        file_tokens(path, Words())


def test_windows_join_documents() -> None:
    cut = windows(["a bb", "ccc dddd eeeee"], Words(), samples=9, seqlen=3)
    assert [row["input_ids"] for row in cut] == [[1, 2, 0], [3, 4, 5]]
    assert windows(["a bb ccc"] * 9, Words(), samples=2, seqlen=4)[1]["attention_mask"] == [1] * 4


def test_too_little_text() -> None:
    with pytest.raises(ValueError, match="2 tokens do not fill one window of 8"):
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
