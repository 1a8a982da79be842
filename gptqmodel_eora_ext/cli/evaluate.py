"""The command `eora eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..adapter.folder import AdapterFolder
from ..adapter.summary import find_adapter
from ..evaluate.perplexity import DEFAULT_WINDOW
from ..evaluate.size import readable
from .options import (
    Json,
    errors,
    fail,
    out,
    progress_bars,
)


def evaluate(
    path: Annotated[Path, typer.Argument(help="A quantised checkpoint.")],
    text: Annotated[Path, typer.Option(help="Held-out text.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter folder; by default the one that the checkpoint names.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = DEFAULT_WINDOW,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Perplexity of a text, with and without the adapter."""
    if not text.is_file():
        fail(f"there is no file `{text}`.")
    if not (path / "config.json").is_file():
        fail(f"`{path}` has no config.json; it is no checkpoint folder.")
    with errors():
        folder = adapter or find_adapter(path, required=False)
        if folder is not None:
            AdapterFolder.open(folder)

    from ..evaluate.report import measure_checkpoint

    with errors(), progress_bars() as bar:
        rows = measure_checkpoint(path, folder, text, window=window, max_windows=max_windows, progress=bar)
    if as_json:
        out.print_json(json.dumps(rows))
        return
    table = Table("model", "perplexity", "loss (nats)", "tokens", "bytes")
    for row in rows:
        table.add_row(row["model"], f"{row['perplexity']:.3f}", f"{row['nats']:.4f}", str(row["tokens"]),
                      readable(row["bytes"]))  # fmt: skip
    out.print(table)
