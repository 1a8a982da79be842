"""A checkpoint's `quantize_config.json` names its adapter, so that loading the checkpoint finds it.

GPTQModel reads ``"adapter": {"name": "lora", "path": "eora", "rank": r}`` there. AutoRound and transformers do not read
that file, so a checkpoint that AutoRound made gets one, in GPTQModel's terms, beside its own `config.json`.
"""

from __future__ import annotations

import logging
import ntpath
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats import autoround
from ..formats.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, QUANTIZE_CONFIG
from ..formats.numbers import is_whole
from ..system.files import write_json
from .errors import AdapterError, Fields, read_json
from .factors import ModuleFactors
from .save import most_common_rank

log = logging.getLogger(__name__)

# The adapter's folder inside a checkpoint, where the user names no other.
DEFAULT_FOLDER = "eora"
# What the entry of a plain PEFT adapter is called, and of one of packed factors.
PLAIN_NAME, PACKED_NAME = "lora", "eora"
# The hub's cache: `models--…/snapshots/<commit>` holds links to files of `models--…/blobs`, named by their hashes.
COMMIT = re.compile(r"[0-9a-fA-F]{40}")
BLOB = re.compile(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class AdapterEntry:
    """A checkpoint's word on its adapter.

    Attributes:
        name: `lora`, or `eora` for packed factors.
        path: the folder, relative to the checkpoint.
        rank: the rank that most modules have, where it is told.
    """

    name: str
    path: str
    rank: int | None


def read_entry(checkpoint: Path) -> AdapterEntry | None:
    """What a checkpoint's `quantize_config.json` says of its adapter; None where it names none, or there is no file.

    Raises:
        AdapterError: when the file is no JSON object, or the entry has another form.
    """
    path = checkpoint / QUANTIZE_CONFIG
    if not path.is_file():
        return None
    remedy = 'It looks like "adapter": {"name": "lora", "path": "eora", "rank": 32}; correct it, or leave it out.'
    content = Fields(read_json(path), f"`{path}`", remedy)
    if not content.mapping("adapter"):
        return None
    entry = content.below("adapter", "adapter")
    name, place = entry.text("name"), entry.text("path")
    if not name:
        raise entry.wrong("name", f"{PLAIN_NAME} or {PACKED_NAME}")
    if not place:
        raise entry.wrong("path", "the adapter's folder, relative to the checkpoint")
    rank = entry.content.get("rank")
    if rank is not None and not is_whole(rank, 1):
        raise entry.wrong("rank", "a positive integer")
    return AdapterEntry(name, place, rank)


def named_folder(checkpoint: Path, entry: AdapterEntry) -> Path:
    """The folder that a checkpoint names, by the rules that `GPTQModel.load` has for it.

    A checkpoint may come from anywhere, so what it names has to lie inside it: no absolute path, no `..`, and no
    symbolic link, except those by which the hub's cache keeps the files of one repository.

    Raises:
        AdapterError: when the path leads out of the checkpoint, or to no folder.
    """
    where = f"Adapter: `{checkpoint / QUANTIZE_CONFIG}` names the adapter's path `{entry.path}`"
    remedy = "Move the adapter into the checkpoint, or name its folder yourself: adapter=EoRA(path=…)."
    parts = Path(entry.path).parts
    if Path(entry.path).is_absolute() or ntpath.isabs(entry.path) or ntpath.splitdrive(entry.path)[0]:
        raise AdapterError(f"{where}, which is absolute; expected a folder inside the checkpoint. {remedy}")
    if ".." in parts or "\\" in entry.path or "\0" in entry.path:
        raise AdapterError(f"{where}, which leads out of the checkpoint; expected a folder inside it. {remedy}")
    root = checkpoint.resolve()
    folder = root
    for part in parts:
        folder = folder / part
        if folder.is_symlink():
            raise AdapterError(f"{where}, but `{folder}` is a symbolic link; expected a folder. {remedy}")
    if not folder.is_dir():
        raise AdapterError(f"{where}, but `{folder}` is no folder. Copy the checkpoint again, or make the adapter "
                           f"again with `eora generate`.")  # fmt: skip
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if (folder / name).is_symlink() and not _is_cached(folder / name, root):
            raise AdapterError(f"{where}, but `{folder / name}` is a symbolic link; expected a file. {remedy}")
    return checkpoint.joinpath(*parts)


def _is_cached(link: Path, root: Path) -> bool:
    """Whether a link in a snapshot of the hub's cache leads to a file of the same repository."""
    repository = root.parent.parent
    if root.parent.name != "snapshots" or not COMMIT.fullmatch(root.name) or not repository.name.startswith("models--"):
        return False
    blobs = repository / "blobs"
    target = Path(os.path.normpath(link.parent / link.readlink()))
    known = target.parent == blobs and BLOB.fullmatch(target.name) is not None
    return known and not blobs.is_symlink() and not target.is_symlink() and target.is_file()


def name_adapter(
    checkpoint: Path, folder: Path, factors: Mapping[str, ModuleFactors], *, known_as: Path | None = None
) -> None:
    """Write the adapter's place into the checkpoint's `quantize_config.json`, if it is inside the checkpoint.

    A checkpoint in 16 bits (AutoRound's format `fake`) has no place for a name.

    Args:
        checkpoint: its folder.
        folder: the adapter's.
        factors: full module name → factors.
        known_as: where the checkpoint will be, when it is written elsewhere first.
    """
    place = str(known_as or checkpoint)
    inside, outside = folder.resolve(), checkpoint.resolve()
    if not inside.is_relative_to(outside):
        log.warning("EoRA: the adapter is in `%s`, outside the checkpoint `%s`, which therefore cannot name it. "
                    "Load it with GPTQModel.load(%r, adapter=EoRA(path=%r)).",
                    folder, place, place, str(folder))  # fmt: skip
        return
    path = checkpoint / QUANTIZE_CONFIG
    if path.is_file():
        content = read_json(path)
    elif autoround.read_config(checkpoint) is None:
        log.warning("EoRA: `%s` has no %s to name the adapter in. Load it with adapter=EoRA(path=%r).",
                    place, QUANTIZE_CONFIG, str(folder))  # fmt: skip
        return
    elif autoround.holds_packed_weights(checkpoint):
        content = autoround.quantize_config(checkpoint)
    else:
        return
    write_json(path, {**content, "adapter": adapter_entry(inside.relative_to(outside).as_posix(), factors)})


def adapter_entry(place: str, factors: Mapping[str, ModuleFactors]) -> dict[str, Any]:
    """What a checkpoint's `quantize_config.json` says of its adapter.

    Packed factors are named `eora`, which GPTQModel without the plugin refuses instead of misreading.

    Args:
        place: the adapter's folder, relative to the checkpoint.
        factors: full module name → factors.
    """
    name = PACKED_NAME if any(one.packed for one in factors.values()) else PLAIN_NAME
    return {"name": name, "path": place, "rank": most_common_rank(factors)}
