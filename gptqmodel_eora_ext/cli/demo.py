"""The command `eora demo`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..adapter.validate import validate_rank
from ..adapter.vocabulary import DEFAULT_RANK
from ..evaluate.size import readable
from .printing import errors, out, progress_bars, say


def demo(
    output: Annotated[Path, typer.Option("--out", help="Folder for the quantised models.")] = Path("demo"),
    bits: Annotated[int, typer.Option(help="2, 3 or 4.", min=2, max=4)] = 2,
    rank: Annotated[int, typer.Option(help="Components per module.")] = DEFAULT_RANK,
) -> None:
    """Quantise SmolLM2-135M with an adapter, load it again in a new process, and show what was won back."""
    with errors():
        validate_rank(rank, what="--rank")

    from ..evaluate.demo import run_demo

    with errors(), progress_bars() as bar:
        rows, seconds = run_demo(output, bits=bits, rank=rank, progress=bar)
    table = Table("model", "perplexity", "on disk", "of it adapter", "seconds", title=f"SmolLM2-135M, {bits} bits")
    for row in rows:
        table.add_row(row["model"], f"{row['perplexity']:.1f}", readable(row["bytes"]),
                      readable(row["adapter_bytes"]) if row["adapter_bytes"] else "",
                      f"{row['seconds']:.0f}")  # fmt: skip
    out.print(table)
    say(f"Held-out text: a novel that calibration did not see. {seconds:.0f} s in all. "
        f'Load it:  GPTQModel.load("{os.fspath(output)}/eora")')  # fmt: skip
