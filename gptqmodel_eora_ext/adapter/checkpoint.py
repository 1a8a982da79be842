"""Saving a checkpoint and its adapter in one step, whichever host writes the checkpoint's own files."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..system.files import replaced_folder

# Files of an older checkpoint that must not stay beside a new one's, even where the new one has none of that name:
# weights, which whoever reads a folder's `*.safetensors` would mix with the new ones, and descriptions of how the old
# weights were quantised. A tokenizer that the host did not write stays, and so does all else.
OBSOLETE = re.compile(
    r"(?:model|pytorch_model)(?:-\d+-of-\d+|-shard-\d+)?\.(?:safetensors|bin)"
    r"|.*\.(?:safetensors|bin)\.index\.json"
    r"|quant(?:ize|ization)?_config\.json|quant_log\.csv"
)
INDEX = "*.index.json"


@contextlib.contextmanager
def replaced_checkpoint(target: Path, *, needed: int = 0, unfinished: Path | None = None) -> Iterator[Path]:
    """Yield a new folder that takes a checkpoint's place when the block ends without an error.

    The host writes its files there, then the adapter goes beside them and is named; a process that is killed at any
    moment leaves the old checkpoint or the whole new one. Shards and manifests of the old checkpoint go; all else that
    stood in its folder is kept (`system.files.replaced_folder`).

    Args:
        target: the checkpoint's folder.
        needed: bytes that will be written, about.
        unfinished: a folder that the host has begun to fill.

    Raises:
        NotADirectoryError: when ``target`` is a file.
        OSError: when there is too little space.
    """
    with replaced_folder(target, needed=needed, obsolete=_obsolete(target), unfinished=unfinished) as fresh:
        yield fresh


def _obsolete(checkpoint: Path) -> Callable[[Path], bool]:
    """Tells which files of a checkpoint go when a new one takes its place, as paths inside its folder."""
    listed = set()
    for index in checkpoint.glob(INDEX):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            listed |= {Path(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}

    def obsolete(inside: Path) -> bool:
        return inside in listed or (len(inside.parts) == 1 and OBSOLETE.fullmatch(inside.name) is not None)

    return obsolete
