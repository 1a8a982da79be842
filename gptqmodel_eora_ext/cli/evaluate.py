"""The command `eora eval`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..evaluate.divergence import DIVERGENCE_WINDOWS
from ..evaluate.items import READERS, read_items
from ..evaluate.outcome import INTERVAL_NOTE, comparisons, rows
from ..evaluate.perplexity import DEFAULT_WINDOW, Windows
from ..evaluate.record import write_record
from ..evaluate.size import readable
from ..evaluate.subjects import FULL_PRECISION, resolve
from ..evaluate.tasks import TaskRequest, task_request
from .options import Json, TrustRemoteCode, check_model, check_text
from .printing import errors, fail, out, progress_bars, say


def evaluate(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Checkpoints, quantised or not, and adapters, each over the checkpoint "
            "before it; NAME=PATH names one.",
        ),
    ],
    base: Annotated[
        str | None, typer.Option(help="The full-precision model to compare with: a folder or a hub name.")
    ] = None,
    texts: Annotated[
        list[Path] | None, typer.Option("--text", help="Held-out text: a file of those that --calibration takes.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="A task of lm-eval, `gsm8k`, its items from the hub; or `gsm8k=FILE`, from a file "
            f"(of {', '.join(READERS)}).",
        ),
    ] = None,
    items: Annotated[
        list[Path] | None,
        typer.Option(help="Your own items, JSON lines: `question`, `choices` and `answer`, or `question`, `answer`."),
    ] = None,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="A text that every model continues.")] = None,
    speed: Annotated[bool, typer.Option(help="Measure tokens per second and peak memory as well.")] = False,
    output: Annotated[Path | None, typer.Option("--out", help="Write every item's result to this report.json.")] = None,
    adapters: Annotated[
        list[Path] | None,
        typer.Option("--adapter", help="Adapter folder for the first checkpoint, in place of the one that it names."),
    ] = None,
    adapters_only: Annotated[
        bool, typer.Option(help="Leave out the row without its adapter of a checkpoint that names one.")
    ] = False,
    window: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = DEFAULT_WINDOW,
    stride: Annotated[
        int | None, typer.Option(help="Slide windows by so many tokens; by default they do not overlap.", min=1)
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows.", min=1)] = None,
    kl_windows: Annotated[
        int, typer.Option(help="Windows of each text that the KL divergence is taken on.", min=0)
    ] = DIVERGENCE_WINDOWS,
    limit: Annotated[int | None, typer.Option(help="Items of a task, at most.", min=1)] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples before each question; by default the task's own number.", min=0)
    ] = None,
    tasks_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own (YAML).")] = None,
    batch_size: Annotated[int, typer.Option(help="Items of a task per forward.", min=1)] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:0; CUDA where there is one.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure models side by side: texts, tasks, speed; beside the full-precision model, what each changes."""
    for text in texts or ():
        check_text(text)
    if not (texts or tasks or items or prompts or speed):
        fail("nothing to evaluate: name a --text, a --task, --items, a --prompt, or ask for --speed.")
    if output is not None and output.is_dir():
        fail(f"`{output}` is a folder; name a file for the results, such as {output / 'report.json'}.")
    with errors():
        windows = Windows(window, stride, max_windows)
        subjects = resolve(paths, base=base, adapters=adapters or (), adapters_only=adapters_only)
        for one in subjects:
            if one.kind == FULL_PRECISION:
                check_model(one.model)
        asked = _tasks(tasks or (), items or ())

        from ..evaluate.measure import Request, measure

        request = Request(
            subjects=subjects, texts=tuple(texts or ()), windows=windows, divergence_windows=kl_windows, tasks=asked,
            tasks_path=None if tasks_path is None else str(tasks_path), limit=limit, shots=shots,
            prompts=tuple(prompts or ()), speed=speed, batch_size=batch_size, device=device,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        with progress_bars() as bar:
            record = measure(request, bar)
        if output is not None:
            write_record(output, record)
    if as_json:
        out.print_json(json.dumps(rows(record)))
        return
    print_record(record)
    if output is not None:
        say(f"Every item's result: {output}. A page of it:  eora report {output.with_name('report.html')}")


def _tasks(tasks: Sequence[str], items: Sequence[Path]) -> list[TaskRequest]:
    """What --task and --items ask for, their files read and checked."""
    found = []
    for task in tasks:
        name, mark, path = task.partition("=")
        found.append(task_request(name, read_items(path, name) if mark else None))
    found += [task_request(None, read_items(path, None)) for path in items]
    names = [one.name for one in found]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        fail(f"the task `{repeated}` is asked for twice; leave one out, or call its file otherwise.")
    return found


def print_record(record: Mapping[str, Any]) -> None:
    """The table of a record, what was written after prompts, and which differences are more than noise."""
    found = rows(record)
    table = Table("model", "bytes", caption=_caption(record))
    shown: list[list[str]] = [[row["model"], _bytes(row["bytes"])] for row in found]

    def column(title: str, cells: Sequence[str]) -> None:
        if any(cells):
            table.add_column(title, justify="right")
            for line, cell in zip(shown, cells, strict=True):
                line.append(cell)

    column("bits/weight", [_number(row["bits_per_weight"], 2) for row in found])
    for text in record["texts"]:
        results = [row["texts"].get(text["name"], {}) for row in found]
        column(f"{text['name']}: perplexity", [_number(one.get("perplexity"), 3) for one in results])
        column("KL", [_number(one.get("kl"), 4) for one in results])
        column("same token", [_share(one.get("same")) for one in results])
    for task in record["tasks"]:
        results = [row["tasks"].get(task["name"], {}) for row in found]
        column(f"{task['name']} ({task['metric'].replace(',', ', ')})", [_share(one.get("value")) for one in results])
    column("tokens/s", [_number(row.get("tokens_per_second"), 1) for row in found])
    column("peak memory", [_bytes(row.get("peak_bytes")) for row in found])
    for line in shown:
        table.add_row(*line)
    out.print(table)
    for sample in record["samples"]:
        say(f"After “{sample['prompt']}”:")
        for one in sample["results"]:
            say(f"  {one['model']}: {' '.join(one['text'].split())}")
    compared = comparisons(record)
    for one in compared:
        say(one.sentence)
    if compared:
        say(f"({INTERVAL_NOTE}.)")


def _caption(record: Mapping[str, Any]) -> str | None:
    windows = sorted({text["windows"] for text in record["texts"]})
    parts = [f"Perplexity over {', '.join(windows)}."] if windows else []
    if any("same" in one for text in record["texts"] for one in text["results"]):
        parts.append("KL: from full precision, nats a token. Same token: share of tokens whose likeliest next is full "
                     "precision's.")  # fmt: skip
    return " ".join(parts) or None


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _bytes(count: int | None) -> str:
    return "" if count is None else readable(count)
