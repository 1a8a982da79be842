"""Where the package keeps files, and writes that leave the old file or the new one, never half of either."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# linux/fcntl.h and linux/fs.h; renameat2 swaps two directories in one step (Linux 3.15, glibc 2.28).
AT_FDCWD = -100
RENAME_EXCHANGE = 2

# What the system answers where a file cannot grow: the disk is full, the user's quota is, or a limit on file sizes.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Names of files and folders that are being written, which a killed process leaves behind.
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.(?:tmp|old)|\..+\.(?:unfinished|resume)")
# Files by which a folder is opened: without them it is taken for no model and no adapter.
NAMES_OTHERS = ("config.json", "adapter_config.json")
# Of each part of a file that `parts_digest` reads.
PART_BYTES = 1 << 16


def no_room(error: BaseException | None) -> int:
    """The system's number where an error, or what has caused it, is that a file could not grow; 0 for other errors.

    Libraries written in Rust (safetensors, tokenizers) tell it as errors of their own, with the number in the text.
    """
    while error is not None:
        for number in NO_ROOM:
            if (isinstance(error, OSError) and error.errno == number) or f"(os error {number})" in str(error):
                return number
        error = error.__cause__ or error.__context__
    return 0


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
def replaced_folder(
    target: Path,
    *,
    needed: int = 0,
    obsolete: Callable[[Path], bool] = lambda inside: False,
    unfinished: Path | None = None,
) -> Iterator[Path]:
    """Yield a new folder that takes ``target``'s place when the block ends without an error.

    Killed at any moment, ``target`` is the old folder or the whole new one. Files of the old folder that the block did
    not write are kept, by hard links where the file system has them, so nothing that a user put there is lost or
    copied. A killed process may leave the new folder beside ``target``, named `.<target>.<8 letters>.tmp`.

    Where ``target`` cannot be swapped (a mount point, a parent that cannot be written to, the working directory) the
    new files are moved into it one by one (`_move_into`).

    Args:
        target: the folder. A link to a folder is followed.
        needed: bytes that the block will write, about; checked beforehand.
        obsolete: tells of a path inside the old folder whether the new one stands in its place even if it has no file
            of that name, as for shards of older weights.
        unfinished: `unfinished_folder(target)`, which may hold files already, to go on with; kept when the block fails.

    Raises:
        NotADirectoryError: when ``target`` is a file.
        OSError: when the file system has no ``needed`` bytes left, or is full before all is written, whichever library
            found it so.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"`{target}` is a file; what is saved is a folder. Choose another path.")
    require_space(target, needed)
    swapped = can_be_swapped(target)
    fresh = unfinished or _beside(target) / f".{target.name}.{secrets.token_hex(4)}.tmp"
    fresh.mkdir(parents=True, exist_ok=unfinished is not None)
    done = False
    try:
        yield fresh
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            fresh.rename(target)
        elif swapped:
            fresh.chmod(target.stat().st_mode)
            _carry_over(target, fresh, obsolete)
            _exchange(fresh, target)
        else:
            _move_into(target, fresh, obsolete)
        done = True
    except Exception as error:
        number = no_room(error)
        if not number:
            raise
        free = shutil.disk_usage(fresh).free
        raise OSError(
            number, f"{os.strerror(number)} while it was saved, {free / 1e6:.1f} MB are free", str(target)
        ) from error
    finally:
        if done or unfinished is None:
            shutil.rmtree(fresh, ignore_errors=True)


def can_be_swapped(target: Path) -> bool:
    """Whether another folder can take ``target``'s place by renaming.

    Not if ``target`` is a mount point, if its parent cannot be written to, or if this process works in it: the shell
    that started it would be left in a folder that is gone.
    """
    if not target.exists():
        return True
    try:
        here = Path.cwd()
    except FileNotFoundError:  # the working directory was removed
        here = target.parent
    inside = here == target or target in here.parents
    return not target.is_mount() and not inside and os.access(target.parent, os.W_OK | os.X_OK)


def unfinished_folder(target: Path) -> Path:
    """A folder beside ``target`` that several runs, one after another, fill before it takes ``target``'s place."""
    target = target.resolve()
    return _beside(target) / f".{target.name}.unfinished"


def _beside(target: Path) -> Path:
    return target.parent if can_be_swapped(target) else target


def require_space(target: Path, needed: int) -> None:
    """Raise unless the file system that ``target`` lies, or will lie, in has so many bytes left.

    Raises:
        OSError: ENOSPC, telling what is needed, what is free, and what would help.
    """
    there = next(place for place in (target, *target.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        left = [entry.name for entry in target.parent.glob(f".{target.name}.*.tmp")] if target.parent.exists() else []
        older = f" `{left[0]}` beside it is of a save that was killed and can be removed." if left else ""
        raise OSError(
            errno.ENOSPC,
            f"saving takes about {needed / 1e9:.1f} GB and `{there}` has {free / 1e9:.1f} GB free, where the old files "
            f"stay until the new ones are complete. Free some space, or save elsewhere.{older}",
            str(target),
        )


def _kept(old: Path, fresh: Path, obsolete: Callable[[Path], bool]) -> Iterator[tuple[Path, Path]]:
    """Pairs of a file, link or empty folder that the old folder has and the new one lacks, and its place there."""
    for folder, names, files in os.walk(old):
        inside = Path(folder).relative_to(old)
        links = [name for name in names if Path(folder, name).is_symlink()]
        # Folders that are still being written are nobody's yet. Where the new folder has a file of the name, nothing
        # can be put below it.
        names[:] = [name for name in names if name not in links and not TEMPORARY.fullmatch(name)
                    and not _is_there(fresh / inside / name, but=Path.is_dir)]  # fmt: skip
        for name in (*files, *links):
            place = fresh / inside / name
            if not _is_there(place) and not obsolete(inside / name) and not TEMPORARY.fullmatch(name):
                yield Path(folder, name), place
        if not names and not files and not links and not _is_there(fresh / inside):
            yield Path(folder), fresh / inside


def _is_there(path: Path, *, but: Callable[[Path], bool] = lambda path: False) -> bool:
    """Whether anything has that name, a broken link included; what ``but`` holds for does not count."""
    return os.path.lexists(path) and not but(path)


def _carry_over(old: Path, fresh: Path, obsolete: Callable[[Path], bool]) -> None:
    for path, place in _kept(old, fresh, obsolete):
        if path.is_dir() and not path.is_symlink():
            place.mkdir(parents=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.is_symlink():
                place.symlink_to(path.readlink())
            else:
                place.hardlink_to(path)
        except OSError:  # a file system without links
            shutil.copy2(path, place)


def _move_into(target: Path, fresh: Path, obsolete: Callable[[Path], bool]) -> None:
    """Move the new files over the old ones where folders cannot be swapped.

    What names the others (`config.json`, `adapter_config.json`) goes first and comes last, so that a folder in which
    this was interrupted is refused by whoever opens it, instead of being read half old and half new.
    """
    new = {Path(folder, name).relative_to(fresh) for folder, _, files in os.walk(fresh) for name in files}
    for inside in new:
        if inside.name in NAMES_OTHERS:
            (target / inside).unlink(missing_ok=True)
    kept = {path for path, _ in _kept(target, fresh, obsolete)}
    for folder, names, files in os.walk(target):
        names[:] = [name for name in names if not TEMPORARY.fullmatch(name)]
        for name in files:
            path = Path(folder, name)
            if path not in kept and path.relative_to(target) not in new:
                path.unlink()
    for inside in sorted(new, key=lambda path: (path.name in NAMES_OTHERS, len(path.parts) == 1)):
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        (fresh / inside).replace(target / inside)


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


def parts_digest(path: Path, parts: int) -> str:
    """A sha256 of a file's size and of so many parts of `PART_BYTES`, evenly from its beginning to its end.

    By it one file of weights is told from another: those have other bytes everywhere, and to read all of a large one
    would take as long as loading it.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for part in range(parts):
            file.seek(max(size - PART_BYTES, 0) * part // (parts - 1))
            digest.update(file.read(PART_BYTES))
    return digest.hexdigest()


def cache_folder() -> Path:
    """For downloads and compiled kernels: `$XDG_CACHE_HOME/gptqmodel-eora-ext`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gptqmodel-eora-ext"
