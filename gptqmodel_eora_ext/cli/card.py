"""The command `eora card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..evaluate.record import NAME
from .printing import errors, say


def card(
    path: Annotated[Path, typer.Argument(help="A checkpoint with an adapter, or an adapter folder.")],
    data: Annotated[
        Path | None, typer.Option(help=f"What `eora eval --out` wrote, for the table; by default {NAME} in PATH.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub name of the base model; by default what the folder says.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Its identifier; by default the base model's, where it is here.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a README.md that `eora card` has not written.")] = False,
) -> None:
    """Write a model card, README.md, for the hub: what it is, how it is loaded, what was measured."""
    from ..evaluate.card import write_card

    with errors():
        written = write_card(path, data=data, base_model=base_model, licence=licence, force=force)
    say(f"{written.path}")
    for note in written.notes:
        say(note)
