"""What an interrupted run leaves behind, so that the same call goes on after its last finished step.

A folder holds `run.json` (what the run was asked, and the layout's version) and a state file for each thing that is
kept (`state_file`). A file is written to another name, brought to the disk, and renamed; so a process that is killed
leaves the old file or the whole new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .files import NO_ROOM, TEMPORARY, replaced_file
from .interrupt import asked_to_stop
from .state_file import read_state, state_bytes, write_state

# Raised whenever an older version could read a newer one's files wrongly, or the reverse.
LAYOUT = 2
RUN, LOCK = "run.json", "lock"


class ResumeError(ValueError):
    """What an interrupted run has left cannot be gone on with; the message says why, and what to do."""


class InUse(ResumeError):
    """Another process is at work there."""


class Stopped(Exception):
    """A run was asked to stop, and has kept all that it had finished. The same call goes on from there.

    Args:
        root: where it is kept.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(f"EoRA: stopped as asked. What was finished is kept in `{root}`; the same call goes on.")


class Kept:
    """What a run keeps. Made by `kept_state`.

    Attributes:
        root: the folder.
        goes_on: whether an interrupted run had left something.
        stopping: tells whether the run is asked to end.
    """

    def __init__(self, root: Path, goes_on: bool, stopping: Callable[[], bool], remedy: str) -> None:
        self.root = root
        self.goes_on = goes_on
        self.stopping = stopping
        self._remedy = remedy

    def __contains__(self, name: str) -> bool:
        return self._file(name).is_file()

    def keep(self, name: str, state: Any, known: Mapping[int, str] | None = None) -> None:
        """Write a state under a name, in place of what was kept under it.

        Args:
            name: a word, without a suffix.
            state: as `write_state` takes it, like ``known``.
            known: see there.

        Raises:
            OSError: when there is no room, naming the file, what it takes, and the remedy; the older file stays.
        """
        file = self._file(name)
        try:
            with replaced_file(file) as unfinished:
                write_state(unfinished, state, known)
            _bring_to_disk(self.root)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            needed, free = state_bytes(state, known), shutil.disk_usage(self.root).free
            raise OSError(
                error.errno,
                f"what is kept of this run takes {needed / 1e6:.1f} MB here and could not be written: "
                f"{os.strerror(error.errno)}, {free / 1e6:.1f} MB are free",
                str(file),
            ) from error

    def read(self, name: str, known: Mapping[str, torch.Tensor] | None = None) -> Any:
        """The state that is kept under a name.

        Args:
            name: of it.
            known: see `read_state`.

        Raises:
            ResumeError: where there is none, or it is damaged.
        """
        file = self._file(name)
        try:
            return read_state(file, known)
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            raise ResumeError(
                f"EoRA: `{file}`, which an interrupted run has left, cannot be read ({error}). {self._remedy}"
            ) from error

    def drop(self, name: str) -> None:
        """Remove what is kept under a name, if anything."""
        self._file(name).unlink(missing_ok=True)

    def step_done(self) -> None:
        """To be called after each step, once it is kept.

        Raises:
            Stopped: where the run was asked to stop meanwhile.
        """
        if self.stopping():
            raise Stopped(self.root)

    def finish(self) -> None:
        """Remove everything: the run is done."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.root / f"{name}.safetensors"


@contextlib.contextmanager
def kept_state(
    root: Path,
    asked: Mapping[str, Any],
    *,
    begin_anew: bool = False,
    supersede: bool = False,
    remedy: str = "",
    tell_soft: Callable[[str], None] = lambda text: None,
    soft: Mapping[str, Any] | None = None,
) -> Iterator[Kept]:
    """Open the folder of what a run keeps, for this process alone, and check that it is of this run.

    Within the block Ctrl-C and SIGTERM are noted, and end the run at the next `Kept.step_done`; a second one ends it at
    once. The folder stays when the block ends; `Kept.finish` removes it.

    Args:
        root: the folder; made if it is missing.
        asked: all that the result depends on (model, data, options, versions), ready for JSON; an interrupted run that
            was asked anything else is refused.
        begin_anew: remove what an interrupted run has left.
        supersede: remove it where it was asked anything else, in place of refusing; for a cache.
        remedy: what to do about a folder that cannot be gone on with, in a sentence; removing it by default.
        tell_soft: hears of what differs in ``soft``.
        soft: what changes the result by rounding alone, such as the number of threads; told where it differs.

    Raises:
        ResumeError: for a folder of another run, with what differs, or of another layout.
        InUse: while another process is at work there.
        OSError: when the folder cannot be made.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(root / LOCK), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InUse(f"EoRA: another process is at work in `{root}`. Wait for it, or end it.") from error
    remedy = remedy or f"Remove `{root}`."
    try:
        if begin_anew:
            _empty(root)
        try:
            goes_on = _check(root, _plain(asked), _plain(soft or {}), remedy, tell_soft)
        except ResumeError:
            if not supersede:
                raise
            _empty(root)
            goes_on = _check(root, _plain(asked), _plain(soft or {}), remedy, tell_soft)
        with asked_to_stop() as stopping:
            yield Kept(root, goes_on, stopping, remedy)
    finally:
        lock.release()
        if not (root / RUN).is_file():
            # Nothing was begun, or all of it is done.
            shutil.rmtree(root, ignore_errors=True)


def resume_folder(target: Path) -> Path:
    """Where the run that makes a file or folder keeps its state: beside it, hidden."""
    target = target.resolve()
    return target.parent / f".{target.name}.resume"


def differences(then: Any, now: Any, path: str = "") -> list[str]:
    """What differs between two JSON values, each as `path: … then, … now`."""
    if isinstance(then, dict) and isinstance(now, dict):
        found = []
        for key in dict.fromkeys((*then, *now)):
            found += differences(then.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if then == now else [f"{path}: {_shown(then)} then, {_shown(now)} now"]


def _check(
    root: Path, asked: Any, soft: Any, remedy: str, tell_soft: Callable[[str], None]
) -> bool:
    """Whether an interrupted run with the same request was there; if not, this one is written down."""
    file = root / RUN
    if not file.is_file():
        _empty(root)
        written = json.dumps({"layout": LAYOUT, "asked": asked, "soft": soft}, indent=2)
        with replaced_file(file) as unfinished, unfinished.open("w", encoding="utf-8") as stream:
            stream.write(written + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        _bring_to_disk(root)
        return False
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        layout = found["layout"]
    except (ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"EoRA: `{file}` is damaged ({error}). {remedy}") from error
    if layout != LAYOUT:
        raise ResumeError(
            f"EoRA: `{root}` was left by a version that keeps layout {layout}; this one keeps {LAYOUT}. {remedy}"
        )
    unlike = differences(found["asked"], asked)
    if unlike:
        raise ResumeError(
            f"EoRA: `{root}` was left by an interrupted run that was asked something else ({'; '.join(unlike)}). "
            f"Ask the same again, and it goes on. {remedy}"
        )
    for one in differences(found.get("soft"), soft):
        tell_soft(one)
    for entry in root.iterdir():
        # What was being written when the process was killed.
        if TEMPORARY.fullmatch(entry.name):
            entry.unlink()
    return True


def _empty(root: Path) -> None:
    """Remove all but the lock, which this process holds; `run.json` first, since it says that the rest is whole."""
    (root / RUN).unlink(missing_ok=True)
    for entry in root.iterdir():
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _plain(value: Any) -> Any:
    """As it will be read back from JSON, where tuples are lists and keys are strings."""
    return json.loads(json.dumps(value))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _bring_to_disk(folder: Path) -> None:
    """Have a rename in a folder outlive a loss of power; some file systems know no such request."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
