"""How the commands print, report and fail. Everything that is printed goes through `out` and `err`.

Paths, names and messages come from users and files, and may hold what looks like rich's markup (`c4[en].jsonl`, `[/x]`)
or its emoji codes: the consoles read neither. Style is given by `Text`, never by brackets in a string.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ..adapter.errors import AdapterError
from ..loop.run import ModuleError
from ..system.distributed import current
from ..system.files import no_room
from ..system.kept import Stopped
from ..system.peers import FAILED as PEER_FAILED

# Reports go to stdout; bars and notes to stderr, so that `--json` can be piped.
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)

# What was asked cannot be: an option, a file, a model that does not fit. Typer's own mistakes have the same status.
WRONG_REQUEST = 2
# It was right and did not work: a hub that does not answer, an error in the middle of the work.
FAILED = 1
# It was right and was interrupted (a signal, a full disk): the same command goes on from there. `EX_TEMPFAIL` of BSD's
# sysexits.h, which schedulers know as a reason to try again.
RESUME = 75
GOES_ON = "What was finished is kept; the same command goes on from there."
MISTAKES = (AdapterError, ValueError, NotImplementedError, NotADirectoryError)


def say(message: str) -> None:
    """Print a line of a report, however long, without breaking it."""
    out.print(message, highlight=False, soft_wrap=True)


def tell_plainly(line: str, stream: Any = None) -> None:
    """Print a line as it is, on stderr by default, also where the consoles are silent."""
    print(line, file=sys.stderr if stream is None else stream, flush=True)


def note(message: str) -> None:
    """Tell what somebody may want to know before the work, beside the report."""
    if events.wanted:
        events.tell("note", text=message)
        return
    err.print(Text.assemble(("note:", "bold"), " ", message), highlight=False, soft_wrap=True)


def fail(message: str, status: int = WRONG_REQUEST) -> NoReturn:
    """Tell a mistake and leave; among several processes, tell the others."""
    if (group := current()) is not None:
        group.peers.end(PEER_FAILED, message)
    if events.wanted:
        events.tell("error", text=message, status=status, resume=status == RESUME)
        raise typer.Exit(status)
    err.print(Text.assemble(("error:", "bold red"), " ", message), highlight=False, soft_wrap=True)
    raise typer.Exit(status)


@contextmanager
def errors(*, resumable: bool = False) -> Iterator[None]:
    """Mistakes in the input, and what the system refuses, end with one line; anything else keeps its traceback.

    Args:
        resumable: whether the work within is kept, so that after an interruption the same command goes on.
    """
    try:
        yield
    except Stopped as error:
        fail(str(error), RESUME)
    except KeyboardInterrupt:
        if not resumable:
            raise
        fail(f"interrupted. {GOES_ON}", RESUME)
    except MISTAKES as error:
        fail(str(error))
    except ModuleError as error:
        # A mistake in the code, which its traceback tells best, is no matter of the input.
        if not isinstance(error.__cause__, (*MISTAKES, OSError)) and not no_room(error):
            raise
        _fail_of_system(str(error), error.__cause__, resumable)
    except Exception as error:
        if not isinstance(error, OSError) and not no_room(error):
            raise
        _fail_of_system(str(error), error, resumable)


def _fail_of_system(message: str, error: BaseException | None, resumable: bool) -> NoReturn:
    """Leave after what the system has refused; where there was no room, the remedy is told, and what comes of it."""
    if not (resumable and no_room(error)):
        fail(message, FAILED)
    fail(message if GOES_ON in message else f"{message}. Free some space. {GOES_ON}", RESUME)


class Events:
    """Progress, notes and errors for schedulers: JSON objects, one a line, on stderr, in place of bars (`--log-json`).

    Each has `time` (seconds since 1970) and `event`: `progress` (`what`, `done`, `total`, `seconds` since it began,
    `left` by the pace so far, or null, and a `note`), `note` (`text`), or `error` (`text`, `status`, `resume`).

    Attributes:
        wanted: whether they are told.
    """

    def __init__(self) -> None:
        self.wanted = False

    def tell(self, event: str, **fields: Any) -> None:
        """Print one."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False)
        tell_plainly(line, sys.__stderr__)

    def progress(self, what: str) -> Callable[..., None]:
        """A `report(done, total)` callback that tells of it."""
        began, first = time.perf_counter(), -1

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal first
            # An interrupted run goes on in the middle; the pace is of what this process has done.
            first = done if first < 0 else first
            seconds = time.perf_counter() - began
            left = seconds / (done - first) * (total - done) if done > first else None
            self.tell("progress", what=what, done=done, total=total, seconds=round(seconds, 3),
                      left=None if left is None else round(left, 1), note=note)  # fmt: skip

        return report


events = Events()


@contextmanager
def progress_bars() -> Iterator[Callable[[str], Callable[..., None]]]:
    """A bar with an estimate; yields a maker of `report(done, total)` callbacks, which take a note as well."""
    if events.wanted:
        yield events.progress
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=err) as progress:

        def start(what: str) -> Callable[[int, int], None]:
            task = progress.add_task(what, total=None)

            def report(done: int, total: int, note: str = "") -> None:
                progress.update(task, completed=done, total=total, description=f"{what}: {note}" if note else what)

            return report

        yield start
