"""Calibration text from a local file or a `datasets` name, cut into token windows of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

DEFAULT_SAMPLES = 128
DEFAULT_SEQLEN = 512
TEXT_COLUMNS = ("text", "content", "prompt")
JSON_SUFFIXES = (".json", ".jsonl")
# Of the windows, where there is text of a task: half serves the task without hurting the rest (EoRA, section 4).
TASK_SHARE = 0.5


def read_texts(source: str, *, split: str = "train") -> Iterable[str]:
    """Return the documents of a source.

    Args:
        source: a `.txt` file (one document), a `.jsonl`, `.json` or `.parquet` file, or a dataset's name, with its
            configuration after a colon (`allenai/c4:en`). The text is the column `text`, `content` or `prompt`.
        split: split of a named dataset.

    Raises:
        ValueError: when the source is no file and not the form of a dataset's name, is empty, or has no text column.
    """
    path = Path(source)
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"Calibration: `{source}` is empty.")
        if path.suffix not in (*JSON_SUFFIXES, ".parquet"):
            return [path.read_text(encoding="utf-8", errors="replace")]
        return _documents(_load("parquet" if path.suffix == ".parquet" else "json", data_files=str(path)), source)
    if path.is_dir() or source.endswith((".txt", *JSON_SUFFIXES, ".parquet")) or source.startswith(("/", ".", "~")):
        raise ValueError(
            f"Calibration: there is no file `{source}`. Pass a text or JSON-lines file, or a dataset name."
        )
    name, _, configuration = source.partition(":")
    return _documents(_load(name, configuration or None, split=split), source)


def _load(*args: Any, split: str = "train", **kwargs: Any) -> Any:
    from datasets import load_dataset

    return load_dataset(*args, split=split, streaming=True, **kwargs)


def _documents(dataset: Any, source: str) -> Iterator[str]:
    for row in dataset:
        column = next((name for name in TEXT_COLUMNS if isinstance(row.get(name), str)), None)
        if column is None:
            raise ValueError(f"Calibration: `{source}` has the columns {sorted(row)}; expected one of {TEXT_COLUMNS}.")
        yield row[column]


def windows(
    texts: Iterable[str], tokenizer: Any, *, samples: int = DEFAULT_SAMPLES, seqlen: int = DEFAULT_SEQLEN
) -> list[dict[str, list[int]]]:
    """Tokenize documents, join them, and cut consecutive windows: what GPTQModel takes as calibration.

    Args:
        texts: documents.
        tokenizer: the model's own.
        samples: windows at most.
        seqlen: tokens per window.

    Raises:
        ValueError: when the text does not fill one window.
    """
    tokens: list[int] = []
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False).input_ids + separator
        if len(tokens) >= samples * seqlen:
            break
    count = min(samples, len(tokens) // seqlen)
    if count == 0:
        raise ValueError(f"Calibration: {len(tokens)} tokens do not fill one window of {seqlen}. Pass more text.")
    return [{"input_ids": tokens[i * seqlen : (i + 1) * seqlen], "attention_mask": [1] * seqlen} for i in range(count)]


def mixed_windows(
    general: Iterable[str],
    task: Iterable[str] | None,
    tokenizer: Any,
    *,
    samples: int = DEFAULT_SAMPLES,
    seqlen: int = DEFAULT_SEQLEN,
    task_share: float = TASK_SHARE,
) -> list[dict[str, list[int]]]:
    """Windows of general text and of a task's, in turns. A task with too little text gives what it has.

    Args:
        general: documents.
        task: documents of the task; None for general text alone.
        tokenizer: the model's own.
        samples: windows at most, of both together.
        seqlen: tokens per window.
        task_share: of ``samples``, above 0 and below 1.

    Raises:
        ValueError: when one of them does not fill a window, or the share is not between 0 and 1.
    """
    if task is None:
        return windows(general, tokenizer, samples=samples, seqlen=seqlen)
    if not 0 < task_share < 1:
        raise ValueError(f"Calibration: the task's share must be between 0 and 1, got {task_share}.")
    wanted = min(max(1, round(samples * task_share)), samples - 1)
    special = windows(task, tokenizer, samples=wanted, seqlen=seqlen)
    plain = windows(general, tokenizer, samples=samples - len(special), seqlen=seqlen)
    # Spread evenly, so that every batch holds some of both.
    order = [((index + 0.5) / len(part), part[index]) for part in (plain, special) for index in range(len(part))]
    return [window for _, window in sorted(order, key=lambda one: one[0])]
