"""The command `eora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..adapter.folder import AdapterFolder
from ..adapter.save import export_peft
from ..adapter.summary import find_adapter, summarize
from .options import check_out
from .printing import errors, fail, progress_bars, say
from .show import print_summary

# So many modules that are not exact are named.
SHOWN = 10


def export(
    path: Annotated[Path, typer.Argument(help="A checkpoint with an adapter, or an adapter folder.")],
    peft: Annotated[
        Path | None, typer.Option("--peft", help="Folder for a plain PEFT copy with 16-bit factors.")
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option("--gguf", help="File for the checkpoint in GGUF, its adapter beside it; or for an adapter alone."),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="With --gguf: the model's GGUF file in 16 bits; for an adapter alone, the one to use it on."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="With --gguf, for an adapter alone: folder of the full-precision model.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
) -> None:
    """Write a plain copy of an adapter, for whatever opens PEFT's folders; or GGUF files for llama.cpp."""
    if (peft is None) == (gguf is None):
        fail("name one of --peft and --gguf.")
    if gguf is not None:
        _export_gguf(path, gguf, like, base, force)
        return
    assert peft is not None
    if like is not None or base is not None:
        fail("--like and --base are for --gguf.")
    with errors():
        folder = find_adapter(path)
        assert folder is not None
    if peft.resolve() in (path.resolve(), folder.resolve()):
        fail(f"`{peft}` is what is read from and must stay as it is. Choose another folder.")
    check_out(peft, force)
    with errors():
        export_peft(AdapterFolder.open(folder), peft)
    print_summary(summarize(peft))


def _export_gguf(path: Path, gguf: Path, like: Path | None, base: Path | None, force: bool) -> None:
    if like is None:
        fail("--gguf needs --like: the model's own GGUF file, which gives the vocabulary and the names of tensors.")
    for name, given in (("PATH", path), ("--base", base)):
        if given is not None and not given.is_dir():
            fail(f"{name} `{given}` is no folder.")
    if not like.is_file():
        fail(f"--like: there is no file `{like}`.")
    if gguf.resolve() == like.resolve() or gguf.is_dir():
        fail(f"`{gguf}` is {'a folder' if gguf.is_dir() else 'what is read from'}; name a file of its own to write.")
    if gguf.exists() and not force:
        fail(f"`{gguf}` is there. Choose another file, or pass --force to replace it.")

    from ..hosts.jobs import ExportJob
    from ..hosts.registry import exporter

    with errors(), progress_bars() as bar:
        done = exporter(like)(ExportJob(path, like, gguf, base, bar("looking through modules")))
    if done.model is not None:
        exact = done.modules - len(done.inexact)
        say(f"model:    {done.model}, {exact} of {done.modules} modules exact")
    for name, gap in sorted(done.inexact.items(), key=lambda item: -item[1])[:SHOWN]:
        say(f"          {name} differs by {gap:.4%} of its norm, since its scales are rounded to float16")
    if done.adapter is not None:
        say(f"adapter:  {done.adapter}")
