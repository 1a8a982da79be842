"""Evaluation items from local files, in the shape that lm-eval's tasks read, checked row by row.

Each known task takes the rows that its data set has on the hub; ARC also the form with a column for each letter. A file
of the user's own holds `question`, `choices` and `answer` (multiple choice), or `question` and `answer`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration import TextError, read_rows

Row = Mapping[str, Any]
CHOICE, ANSWER = "multiple choice", "question and answer"
# lm-eval's own pattern for MathQA's options: a choice that it does not find would shift the others.
MATHQA_OPTION = re.compile(r"[abcd] \) .*?, |e \) .*?$")
GSM8K_MARK = "#### "
# Names that tasks are called by, where lm-eval has another.
ALIASES = {"lambada": "lambada_openai"}


@dataclass(frozen=True)
class Items:
    """The items of a file.

    Attributes:
        task: lm-eval's name of the task; the file's name for one of the user's own.
        kind: None for a task that lm-eval knows; `CHOICE` or `ANSWER` for the user's own.
        rows: in the shape that the task reads.
        path: the file.
    """

    task: str
    kind: str | None
    rows: Sequence[dict[str, Any]]
    path: Path


def read_items(path: str | Path, task: str | None) -> Items:
    """Read and check a file of evaluation items.

    Args:
        path: JSON lines, or an array of objects; gzip and Zstandard are unpacked.
        task: a task of `READERS`, whose rows these are; None for the user's own form.

    Raises:
        TextError: a ValueError, for a file without items, an unknown task, a field that is missing or of a wrong kind,
            or a label out of range; it names the file and the line.
    """
    place = Path(path).expanduser()
    if task is not None:
        task = ALIASES.get(task, task)
        if task not in READERS:
            raise TextError(
                f"`{path}` is given for the task `{task}`; files are read for {', '.join(READERS)}. Leave the name out "
                f"for items of your own (`question`, `choices`, `answer`)."
            )
    found = []
    kind: str | None = None
    for where, row in read_rows(place):
        if not isinstance(row, Mapping):
            raise TextError(f"{where} is {'null' if row is None else f'a {type(row).__name__}'}, expected an object.")
        if task is None:
            found_kind = CHOICE if "choices" in row else ANSWER
            if kind is not None and found_kind != kind:
                raise TextError(
                    f"{where} is an item of {found_kind}, those before are {kind}. Give each kind a file of its own, "
                    f"since they are scored in different ways."
                )
            kind = found_kind
        found.append((READERS[task] if task else _own)(row, where))
    if not found:
        raise TextError(f"`{place}` holds no items.")
    name = task or re.sub(r"\W+", "_", place.name.split(".")[0]).strip("_") or "items"
    return Items(name, kind, found, place)


# Fields --------------------------------------------------------------------------------------------------------


def _text(row: Row, field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise TextError(f"{where}: `{field}` {_found(row, field)}, expected a text.")
    return value


def _texts(row: Row, field: str, where: str) -> list[str]:
    value = row.get(field)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(one, str) and one for one in value):
        raise TextError(f"{where}: `{field}` {_found(row, field)}, expected a list of at least two texts.")
    return value


def _found(row: Row, field: str) -> str:
    if field not in row:
        return f"is missing (the row has {', '.join(map(str, row)) or 'no fields'})"
    shown = repr(row[field])
    return f"is {shown if len(shown) <= 60 else shown[:57] + '…'}"


def _label(value: Any, count: int, field: str, where: str, *, first: int = 0) -> int:
    """A choice's number, counted from ``first``, given as a number or its digits; returned counted from 0."""
    number = int(value) if isinstance(value, str) and value.strip().isdigit() else value
    if not isinstance(number, int) or isinstance(number, bool) or not first <= number < first + count:
        raise TextError(
            f"{where}: `{field}` is {value!r}, expected a number from {first} to {first + count - 1} for {count} "
            f"choices."
        )
    return number - first


def _among(row: Row, field: str, known: Sequence[str], where: str) -> str:
    value = row.get(field)
    if value not in list(known):
        raise TextError(f"{where}: `{field}` {_found(row, field)}, expected one of {', '.join(known)}.")
    return str(value)


# Tasks ---------------------------------------------------------------------------------------------------------


def _arc(row: Row, where: str) -> dict[str, Any]:
    question = _text(row, "question", where)
    if "choices" in row:
        choices = row["choices"]
        if not isinstance(choices, Mapping):
            raise TextError(f"{where}: `choices` {_found(row, 'choices')}, expected `text` and `label`.")
        labels, texts, key = _texts(choices, "label", where), _texts(choices, "text", where), "answerKey"
    else:
        labels, key = _texts(row, "label", where), "answer"
        texts = [_text(row, label, where) for label in labels]
    if len(labels) != len(texts):
        raise TextError(f"{where}: `choices` has {len(labels)} labels for {len(texts)} texts, expected one for each.")
    answer = _among(row, key, labels, where)
    return {
        "id": str(row.get("id", "")),
        "question": question,
        "choices": {"text": texts, "label": labels},
        "answerKey": answer,
    }


def _mathqa(row: Row, where: str) -> dict[str, Any]:
    problem, options = _text(row, "Problem", where), _text(row, "options", where)
    choices = MATHQA_OPTION.findall(options)
    correct = _among(row, "correct", string.ascii_lowercase[:5], where)
    if len(choices) <= string.ascii_lowercase.index(correct):
        raise TextError(
            f"{where}: `options` holds {len(choices)} choices, `correct` is {correct!r}; expected "
            f"`a ) …, b ) …, c ) …, d ) …, e ) …`."
        )
    return {"Problem": problem, "options": options, "correct": correct}


def _gsm8k(row: Row, where: str) -> dict[str, Any]:
    answer = _text(row, "answer", where)
    if GSM8K_MARK not in answer:
        raise TextError(f"{where}: `answer` ends without `{GSM8K_MARK}` and the number, by which it is compared.")
    return {"question": _text(row, "question", where), "answer": answer}


def _lambada(row: Row, where: str) -> dict[str, Any]:
    text = _text(row, "text", where)
    if " " not in text.strip():
        raise TextError(f"{where}: `text` is {text[:60]!r}, expected several words: the last one is asked for.")
    return {"text": text}


def _hellaswag(row: Row, where: str) -> dict[str, Any]:
    endings = _texts(row, "endings", where)
    # `ctx_b` may be empty: the ending then begins the sentence.
    if not isinstance(row.get("ctx_b"), str):
        raise TextError(f"{where}: `ctx_b` {_found(row, 'ctx_b')}, expected a text.")
    texts = {field: _text(row, field, where) for field in ("ctx_a", "activity_label")}
    label = _label(row.get("label"), len(endings), "label", where)
    return {**texts, "ctx_b": row["ctx_b"], "endings": endings, "label": str(label)}


def _piqa(row: Row, where: str) -> dict[str, Any]:
    texts = {field: _text(row, field, where) for field in ("goal", "sol1", "sol2")}
    return {**texts, "label": _label(row.get("label"), 2, "label", where)}


def _winogrande(row: Row, where: str) -> dict[str, Any]:
    texts = {field: _text(row, field, where) for field in ("sentence", "option1", "option2")}
    if "_" not in texts["sentence"]:
        raise TextError(f"{where}: `sentence` is {texts['sentence'][:60]!r}, expected one with `_` for the option.")
    return {**texts, "answer": str(1 + _label(row.get("answer"), 2, "answer", where, first=1))}


def _ifeval(row: Row, where: str) -> dict[str, Any]:
    prompt = _text(row, "prompt", where)
    names, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
        raise TextError(
            f"{where}: `instruction_id_list` {_found(row, 'instruction_id_list')}, expected names of instructions."
        )
    if not isinstance(arguments, list) or len(arguments) != len(names):
        raise TextError(
            f"{where}: `kwargs` {_found(row, 'kwargs')}, expected {len(names)} objects, one for each instruction."
        )
    for number, one in enumerate(arguments):
        if not isinstance(one, Mapping):
            raise TextError(f"{where}: `kwargs[{number}]` is {one!r}, expected an object.")
    return {"key": row.get("key", 0), "prompt": prompt, "instruction_id_list": names, "kwargs": arguments}


def _own(row: Row, where: str) -> dict[str, Any]:
    """An item of the user's own: the answer to a choice is its number from 0, its letter, or its text."""
    question = _text(row, "question", where)
    if "choices" not in row:
        answer = row.get("answer")
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            return {"question": question, "answer": str(answer)}
        return {"question": question, "answer": _text(row, "answer", where).strip()}
    choices = _texts(row, "choices", where)
    answer, letters = row.get("answer"), string.ascii_uppercase[: len(choices)]
    if "answer" not in row:
        raise TextError(f"{where}: `answer` {_found(row, 'answer')}, expected the number of a choice, from 0.")
    if isinstance(answer, str) and answer in choices:
        number = choices.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer.isalpha():
        if answer.upper() not in letters:
            raise TextError(
                f"{where}: `answer` is {answer!r}, expected one of {', '.join(letters)} for {len(choices)} choices."
            )
        number = letters.index(answer.upper())
    else:
        number = _label(answer, len(choices), "answer", where)
    return {"question": question, "choices": choices, "answer": number}


READERS: dict[str, Callable[[Row, str], dict[str, Any]]] = {
    "arc_challenge": _arc,
    "arc_easy": _arc,
    "mathqa": _mathqa,
    "gsm8k": _gsm8k,
    "lambada_openai": _lambada,
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "ifeval": _ifeval,
}
