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
from .options import Json, TrustRemoteCode, check_text
from .printing import errors, fail, out, progress_bars


def evaluate(
    path: Annotated[Path, typer.Argument(help="A checkpoint: quantised, with or without an adapter, or not.")],
    text: Annotated[Path, typer.Option(help="Held-out text: a file of those that --calibration takes.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter folder; by default the one that the checkpoint names.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = DEFAULT_WINDOW,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows.", min=1)] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a text, with and without the adapter."""
    check_text(text)
    if not (path / "config.json").is_file():
        fail(f"`{path}` has no config.json; it is no checkpoint folder.")
    with errors():
        folder = adapter or find_adapter(path, required=False)
        if folder is not None:
            AdapterFolder.open(folder)

    from ..evaluate.report import measure_checkpoint

    with errors(), progress_bars() as bar:
        rows = measure_checkpoint(path, folder, text, window=window, max_windows=max_windows,
                                  trust_remote_code=trust_remote_code, progress=bar)  # fmt: skip
    if as_json:
        out.print_json(json.dumps(rows))
        return
    table = Table("model", "perplexity", "loss (nats)", "tokens", "bytes")
    for row in rows:
        table.add_row(row["model"], f"{row['perplexity']:.3f}", f"{row['nats']:.4f}", str(row["tokens"]),
                      readable(row["bytes"]))  # fmt: skip
    out.print(table)
