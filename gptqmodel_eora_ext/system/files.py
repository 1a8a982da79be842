"""Where the package keeps files, and writes that leave the old file or the new one, never half of either."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# linux/fcntl.h and linux/fs.h; renameat2 swaps two directories in one step (Linux 3.15, glibc 2.28).
AT_FDCWD = -100
RENAME_EXCHANGE = 2


@contextlib.contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``target`` that is renamed to it when the block ends without an error."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON to a temporary name, then rename it to ``path``."""
    with replaced_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder that takes ``target``'s place when the block ends without an error.

    Files of the old folder that the block did not write are carried over, so nothing a user put there is lost.

    Raises:
        NotADirectoryError: when ``target`` is a file.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"`{target}` is a file; an adapter is a folder. Choose another path.")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    fresh.mkdir()
    try:
        yield fresh
        if target.exists():
            _carry_over(target, fresh)
            _exchange(fresh, target)
        else:
            fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _carry_over(old: Path, fresh: Path) -> None:
    for entry in old.iterdir():
        kept = fresh / entry.name
        if kept.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, kept, symlinks=True)
        else:
            shutil.copy2(entry, kept, follow_symlinks=False)


def _exchange(fresh: Path, target: Path) -> None:
    """Swap two folders; in one step on Linux, in two renames where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is not None:
        done = renameat2(AT_FDCWD, os.fsencode(fresh), AT_FDCWD, os.fsencode(target), RENAME_EXCHANGE)
        if done == 0:
            return
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    target.rename(old)
    fresh.rename(target)
    old.rename(fresh)


def cache_folder() -> Path:
    """For downloads and compiled kernels: `$XDG_CACHE_HOME/gptqmodel-eora-ext`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gptqmodel-eora-ext"
