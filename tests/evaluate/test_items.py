"""Evaluation files: every kind of row that is read, and every fault named with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptqmodel_eora_ext.calibration import TextError
from gptqmodel_eora_ext.evaluate.items import ANSWER, CHOICE, READERS, read_items

GOOD: dict[str, dict[str, Any]] = {
    "arc_challenge": {"id": "a", "question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]},
                      "answerKey": "2"},
    "arc_easy": {"id": "a", "question": "Which?", "A": "x", "B": "y", "label": ["A", "B"], "answer": "B"},
    "mathqa": {"Problem": "1 + 1 ?", "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) none", "correct": "b"},
    "gsm8k": {"question": "1 + 1 ?", "answer": "It is 2.\n#### 2"},
    "lambada_openai": {"text": "the last word"},
    "hellaswag": {"ctx_a": "A man", "ctx_b": "", "activity_label": "Walking", "endings": ["walks", "flies"],
                  "label": "0"},
    "piqa": {"goal": "open a door", "sol1": "push", "sol2": "eat it", "label": 0},
    "winogrande": {"sentence": "The _ ran.", "option1": "dog", "option2": "stone", "answer": "1"},
    "ifeval": {"key": 1, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
}  # fmt: skip
CHOICES = {"question": "Which?", "choices": ["x", "y", "z"], "answer": 1}
OPEN = {"question": "Who?", "answer": "Emma"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("task", READERS)
def test_rows_of_known_tasks(task: str, tmp_path: Path) -> None:
    found = read_items(write(tmp_path / "rows.jsonl", GOOD[task], GOOD[task]), task)
    assert (found.task, found.kind, len(found.rows)) == (task, None, 2)
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([GOOD[task]] * 2, indent=1))
    assert read_items(array, task).rows == found.rows


def test_forms_of_an_answer(tmp_path: Path) -> None:
    letters = write(tmp_path / "my items.jsonl", *({**CHOICES, "answer": one} for one in (1, "1", "b", "B", "y")))
    found = read_items(letters, None)
    assert found.kind == CHOICE and found.task == "my_items"
    assert [row["answer"] for row in found.rows] == [1] * 5
    numbers = read_items(write(tmp_path / "open.jsonl", OPEN, {**OPEN, "answer": 7}), None)
    assert numbers.kind == ANSWER and [row["answer"] for row in numbers.rows] == ["Emma", "7"]
    assert read_items(write(tmp_path / "l.jsonl", GOOD["lambada_openai"]), "lambada").task == "lambada_openai"


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (None, {"question": None}, "`question` is None, expected a text"),
        (None, {"answer": 3}, "`answer` is 3, expected a number from 0 to 2 for 3 choices"),
        (None, {"answer": -1}, "`answer` is -1, expected a number from 0 to 2"),
        (None, {"answer": "D"}, "`answer` is 'D', expected one of A, B, C for 3 choices"),
        (None, {"answer": True}, "`answer` is True, expected a number"),
        (None, {"choices": ["x"]}, "expected a list of at least two texts"),
        ("arc_challenge", {"answerKey": "3"}, "`answerKey` is '3', expected one of 1, 2"),
        ("arc_challenge", {"choices": {"text": ["x", "y"], "label": ["1", "2", "3"]}}, "3 labels for 2 texts"),
        ("arc_easy", {"A": ""}, "`A` is '', expected a text"),
        ("mathqa", {"correct": "f"}, "`correct` is 'f', expected one of a, b, c, d, e"),
        ("mathqa", {"options": "a ) 1 , b ) 2", "correct": "e"}, "`options` holds 1 choices"),
        ("gsm8k", {"answer": "It is 2."}, "`answer` ends without `#### `"),
        ("lambada_openai", {"text": "word"}, "expected several words"),
        ("hellaswag", {"label": "2"}, "`label` is '2', expected a number from 0 to 1"),
        ("hellaswag", {"ctx_b": None}, "`ctx_b` is None"),
        ("piqa", {"label": 2}, "`label` is 2, expected a number from 0 to 1"),
        ("winogrande", {"answer": "0"}, "`answer` is '0', expected a number from 1 to 2"),
        ("winogrande", {"sentence": "The dog ran."}, "expected one with `_`"),
        ("ifeval", {"kwargs": []}, "expected 1 objects, one for each instruction"),
        ("ifeval", {"kwargs": [3]}, r"`kwargs\[0\]` is 3, expected an object"),
        ("ifeval", {"instruction_id_list": []}, "expected names of instructions"),
    ],
)
def test_a_fault_is_named_with_its_line(task: str | None, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = GOOD[task] if task else CHOICES
    path = write(tmp_path / "rows.jsonl", good, {**good, **change})
    with pytest.raises(TextError, match=message) as caught:
        read_items(path, task)
    assert f"`{path}`, line 2" in str(caught.value)


@pytest.mark.parametrize("task", READERS)
def test_a_missing_field_is_named(task: str, tmp_path: Path) -> None:
    for field in GOOD[task]:
        if field in ("id", "key"):
            continue
        short = {name: value for name, value in GOOD[task].items() if name != field}
        path = write(tmp_path / "rows.jsonl", GOOD[task], short)
        with pytest.raises(TextError, match="line 2") as caught:
            read_items(path, task)
        # ARC without `choices` is looked for in its other form.
        named = field if (task, field) != ("arc_challenge", "choices") else "label"
        assert f"`{named}`" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "task", "message"),
    [
        ("", None, "is empty"),
        ("[]", None, "holds no items"),
        ("\n\n", None, "holds no items"),
        ('{"question": "a"', None, "no complete JSON"),
        ("null\n", None, "is null, expected an object"),
        ("plain words", "gsm8k", "no complete JSON"),
        (json.dumps(CHOICES) + "\n" + json.dumps(OPEN), None, "those before are multiple choice"),
        (json.dumps(OPEN), "mmlu", "given for the task `mmlu`; files are read for arc_challenge"),
    ],
)
def test_files_that_are_none(content: str, task: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(TextError, match=message):
        read_items(path, task)
    with pytest.raises(TextError, match="there is no file"):
        read_items(tmp_path / "none.jsonl", None)
    words = tmp_path / "words.txt"
    words.write_text("plain words")
    with pytest.raises(TextError, match="is text; expected JSON lines"):
        read_items(words, None)
