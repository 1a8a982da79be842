"""The command `eora export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..adapter.folder import AdapterFolder
from ..adapter.save import export_peft
from ..adapter.summary import find_adapter, summarize
from ..formats.factors import PACKED_BITS
from .options import check_out, check_text
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
    packed: Annotated[
        Path | None, typer.Option("--packed", help="Folder for a copy with packed factors, of one that was trained.")
    ] = None,
    factor_bits: Annotated[
        int | None, typer.Option(help="With --packed: bits of a factor, 8 or 4; 4 by default.")
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option("--text", help="With --packed: held-out text, whose loss before and after is told."),
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
    """Write a copy of an adapter: plain, for whatever opens PEFT's folders; packed; or GGUF files for llama.cpp."""
    if [peft, gguf, packed].count(None) != 2:
        fail("name one of --peft, --packed and --gguf.")
    if packed is None and (factor_bits is not None or texts):
        fail("--factor-bits and --text are for --packed.")
    if gguf is not None:
        _export_gguf(path, gguf, like, base, force)
        return
    if like is not None or base is not None:
        fail("--like and --base are for --gguf.")
    output = peft or packed
    assert output is not None
    with errors():
        folder = find_adapter(path)
        assert folder is not None
    if output.resolve() in (path.resolve(), folder.resolve()):
        fail(f"`{output}` is what is read from and must stay as it is. Choose another folder.")
    check_out(output, force)
    if packed is not None:
        _export_packed(path, folder, packed, PACKED_BITS[-1] if factor_bits is None else factor_bits, texts or [])
        return
    with errors():
        export_peft(AdapterFolder.open(folder), output)
    print_summary(summarize(output))


def _export_packed(path: Path, folder: Path, output: Path, bits: int, texts: Sequence[Path]) -> None:
    for text in texts:
        check_text(text)

    from ..adapter.packing import export_packed

    with errors():
        opened = AdapterFolder.open(folder)
        checkpoint = _checkpoint_of(path, opened) if texts else None
        changed = export_packed(opened, output, bits)
    print_summary(summarize(output))
    worst = max(changed, key=lambda name: changed[name])
    say(f"rounding changes a module's BA by {sum(changed.values()) / len(changed):.1%} of its norm in the mean, and "
        f"{worst}'s, the most, by {changed[worst]:.1%}")  # fmt: skip
    if checkpoint is None:
        return

    from ..evaluate.measure import Request, measure
    from ..evaluate.subjects import resolve
    from .evaluate import print_record

    with errors(), progress_bars() as bar:
        subjects = resolve([str(checkpoint)], adapters=(folder, output), adapters_only=True)
        record = measure(Request(subjects=subjects, texts=tuple(texts)), bar)
    print_record(record)


def _checkpoint_of(path: Path, adapter: AdapterFolder) -> Path:
    """The quantised model that an adapter is for: PATH, the folder around the adapter, or what its config names."""
    named = adapter.settings.base_model
    places = [path, adapter.path.parent, *([] if not named else [Path(named)])]
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None:
        fail(f"--text needs the checkpoint that `{path}` is for. Its adapter_config.json names `{named}`, which is no "
             f"folder here; put the adapter's folder into the checkpoint's.")  # fmt: skip
    return found


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
