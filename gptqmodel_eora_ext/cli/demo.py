"""The command `eora demo`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..evaluate.demo import DEFAULT_TOTAL, MAX_WINDOWS, MIX, REPORT, WINDOW
from ..evaluate.outcome import comparisons, rows
from ..evaluate.size import readable
from .printing import errors, out, progress_bars, say


def demo(
    output: Annotated[Path, typer.Option("--out", help="Folder for the quantised models.")] = Path("demo"),
    total: Annotated[
        str, typer.Option(help="Size of the mix, all in, like --total of `eora plan`: 2.75bpw, 35MB.")
    ] = DEFAULT_TOTAL,
) -> None:
    """Quantise SmolLM2-135M to a planned, refined mix and to plain 3 bits, load both from disk, and compare them."""
    from ..evaluate.demo import run_demo

    with errors(), progress_bars() as bar:
        record, seconds = run_demo(output, total=total, progress=bar)
    [text] = record["texts"]
    table = Table(
        "model", "on disk", "bits/weight", "perplexity", "KL", "tokens/s",
        title="SmolLM2-135M", caption=f"Perplexity of a novel that calibration did not see, {WINDOW} tokens × "
                                      f"{MAX_WINDOWS}. KL: from full precision, nats a token.",
    )  # fmt: skip
    for row in rows(record):
        found = row["texts"][text["name"]]
        table.add_row(
            row["model"], readable(row["bytes"]), f"{row['bits_per_weight']:.2f}" if row["bits_per_weight"] else "16",
            f"{found['perplexity']:.1f}", "" if found["kl"] is None else f"{found['kl']:.2f}",
            f"{row['tokens_per_second']:.0f}",
        )  # fmt: skip
    out.print(table)
    for sample in record["samples"]:
        say(f"\n“{sample['prompt']} …”")
        for one in sample["results"]:
            say(f"  {one['model']}: … {' '.join(one['text'].split())}")
    say("")
    for one in comparisons(record):
        say(one.sentence)
    steps = ", ".join(f"{stage['name']} {stage['seconds']:.0f} s" for stage in record["stages"])
    say(f"{seconds:.0f} s in all: {steps}.")
    say(f'Load it:  GPTQModel.load("{os.fspath(output)}/{MIX}")')
    say(f"The report: {output / REPORT}")
