"""`eora study`: from a model to the table that says which adapter is worth its bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..adapter.vocabulary import FACTOR_BITS, OBJECTIVES
from ..calibration import DEFAULT_SAMPLES
from ..evaluate.perplexity import DEFAULT_WINDOW
from ..evaluate.size import readable
from ..evaluate.study import FULL_PRECISION, Study, StudyOptions, text_names
from ..evaluate.tasks import check_tasks
from .options import (
    FORMATS,
    ITERS,
    BatchSize,
    Calibration,
    Json,
    Model,
    Samples,
    SeqLen,
    TrustRemoteCode,
    adapter_options,
    check_apart,
    check_format,
    check_model,
    check_text,
    read_calibration,
)
from .printing import errors, fail, out, progress_bars

EXAMPLE = "Example:  eora study Qwen/Qwen3-8B study --calibration allenai/c4:en --text heldout.txt --budget 0.5bpw"
RANKS = (32, 64, 256)
SEQLEN = 2048


def study(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the study; started again, it goes on.")],
    calibration: Calibration,
    texts: Annotated[list[Path] | None, typer.Option("--text", help="File of held-out text; once for each.")] = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option("--lm-eval", help="A task of lm-eval to score; once for each.")
    ] = None,
    lm_eval_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own (YAML).")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of a task, at most.", min=1)] = None,
    task: Annotated[
        str | None, typer.Option(help="Text of a task, like --calibration: half of the windows are taken from it.")
    ] = None,
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 2,
    group_size: Annotated[int, typer.Option(help="Weights per scale; -1 for a whole row.")] = 64,
    sym: Annotated[bool, typer.Option(help="Symmetric quantisation; at 2 bits the better choice.")] = True,
    iters: Annotated[int, typer.Option(help="AutoRound's tuning steps per block; 0 rounds to nearest.", min=0)] = ITERS,
    format: Annotated[str, typer.Option(help=f"AutoRound's export: {', '.join(FORMATS)}.")] = FORMATS[0],
    ranks: Annotated[
        list[int] | None, typer.Option("--rank", help="A rank; once for each. By default 32, 64 and 256.")
    ] = None,
    budgets: Annotated[
        list[str] | None, typer.Option("--budget", help="A budget, like that of `eora generate`; once for each.")
    ] = None,
    factor_bits: Annotated[
        int, typer.Option(help="Bits of a stored factor: 16 (plain PEFT), 8 or 4 (packed).")
    ] = FACTOR_BITS[0],
    samples: Samples = DEFAULT_SAMPLES,
    seqlen: SeqLen = SEQLEN,
    batch_size: BatchSize = 8,
    window: Annotated[int, typer.Option(help="Tokens per evaluation window.", min=2)] = DEFAULT_WINDOW,
    max_windows: Annotated[int | None, typer.Option(help="Evaluation windows of a text, at most.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:0; CUDA where there is one.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Quantise with AutoRound, make adapters in several sizes, evaluate each: score and bytes, before and after."""
    check_format(format, bits)
    check_model(model)
    check_apart(output, model)
    _check_adapters(ranks or (), budgets or (), factor_bits)
    _check_evaluation(texts or (), lm_eval or (), lm_eval_path)
    for source in (calibration, task):
        if source is not None:
            read_calibration(source)
    options = StudyOptions(
        model=model, calibration=calibration, task=task, texts=tuple(map(str, texts or ())),
        lm_eval=tuple(lm_eval or ()), lm_eval_path=None if lm_eval_path is None else str(lm_eval_path), limit=limit,
        ranks=tuple(ranks or (() if budgets else RANKS)), budgets=tuple(budgets or ()), factor_bits=factor_bits,
        bits=bits, group_size=group_size, sym=sym, iters=iters, format=format, samples=samples, seqlen=seqlen,
        batch_size=batch_size, window=window, max_windows=max_windows, device=device,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    rows = _results(output, options)
    if as_json:
        out.print_json(json.dumps(rows))
    else:
        _print(rows, text_names(options.texts))


def _results(folder: Path, options: StudyOptions) -> list[dict[str, Any]]:
    with errors():
        study = Study(folder, options)
        with progress_bars() as bar:
            study.run(bar)
        return study.results()


def _check_adapters(ranks: Sequence[int], budgets: Sequence[str], factor_bits: int) -> None:
    for rank in ranks:
        adapter_options(rank, None, OBJECTIVES[0], factor_bits, None)
    for budget in budgets:
        adapter_options(None, budget, OBJECTIVES[0], factor_bits, None)


def _check_evaluation(texts: Sequence[Path], tasks: Sequence[str], tasks_path: Path | None) -> None:
    if not texts and not tasks:
        fail("nothing to evaluate on: name a --text, a task with --lm-eval, or both.")
    for text in texts:
        check_text(text)
    if tasks:
        with errors():
            check_tasks(tasks, None if tasks_path is None else str(tasks_path))


def _print(rows: list[dict[str, Any]], names: dict[str, str]) -> None:
    scores = Table("model", title="Perplexity and scores, and the share of what was lost that is won back")
    sizes = Table("model", "base", "adapter", "total", "bits per weight added", "seconds", title="Bytes")
    tasks = rows[0]["scores"]
    for name in (*names.values(), *(f"{task} ({tasks[task]['metric']})" for task in tasks)):
        scores.add_column(name)
        scores.add_column("won back")
    for row in rows:
        found = {text: f"{row['losses'][text]['perplexity']:.2f}" for text in names}
        found |= {task: f"{row['scores'][task]['value']:.4f}" for task in tasks}
        cells = [row["model"]]
        for one, value in found.items():
            share = row.get("recovered", {}).get(one)
            cells += [value, "" if not share else f"{share:.1%}"]
        scores.add_row(*cells)
        if row["model"] != FULL_PRECISION:
            sizes.add_row(row["model"], readable(row["bytes"]), readable(row["adapter_bytes"]),
                          readable(row["bytes"] + row["adapter_bytes"]), f"{row['bits_added']:.3f}",
                          f"{row['seconds']:.0f}")  # fmt: skip
    out.print(scores)
    out.print(sizes)
