"""The command `eora report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..evaluate.record import NAME
from .printing import errors, fail, say


def report(
    page: Annotated[Path, typer.Argument(metavar="OUT.html", help="The page to write.")],
    data: Annotated[
        Path | None, typer.Option(help=f"What `eora eval --out` wrote; by default {NAME} beside the page.")
    ] = None,
) -> None:
    """Make one HTML page, which stands alone, from the results of `eora eval`."""
    if page.suffix.lower() not in (".html", ".htm"):
        fail(f"`{page}` must end in .html.")
    if page.is_dir():
        fail(f"`{page}` is a folder; name a file to write.")

    from ..evaluate.report.page import make_report

    with errors():
        beside = make_report(page, data)
    say(f"{page}, made from {beside}")
