"""The command `eora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..adapter.folder import AdapterFolder
from ..adapter.save import export_peft
from ..adapter.summary import find_adapter, summarize
from .options import check_out
from .printing import errors, fail
from .show import print_summary


def export(
    path: Annotated[Path, typer.Argument(help="A checkpoint with an adapter, or an adapter folder.")],
    peft: Annotated[Path, typer.Option("--peft", help="Folder for a plain PEFT copy with 16-bit factors.")],
    force: Annotated[bool, typer.Option(help="Replace a folder that is there.")] = False,
) -> None:
    """Write a copy of an adapter that PEFT, vLLM and GPTQModel open without this plugin."""
    with errors():
        folder = find_adapter(path)
        assert folder is not None
    if peft.resolve() in (path.resolve(), folder.resolve()):
        fail(f"`{peft}` is what is read from and must stay as it is. Choose another folder.")
    check_out(peft, force)
    with errors():
        export_peft(AdapterFolder.open(folder), peft)
    print_summary(summarize(peft))
