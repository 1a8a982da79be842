"""How the commands print, report and fail. Everything that is printed goes through `out` and `err`.

Paths, names and messages come from users and files, and may hold what looks like rich's markup (`c4[en].jsonl`, `[/x]`)
or its emoji codes: the consoles read neither. Style is given by `Text`, never by brackets in a string.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ..adapter.errors import AdapterError
from ..loop.run import ModuleError
from ..system.distributed import current
from ..system.peers import FAILED as PEER_FAILED

# Reports go to stdout; bars and notes to stderr, so that `--json` can be piped.
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)

# What was asked cannot be: an option, a file, a model that does not fit. Typer's own mistakes have the same status.
WRONG_REQUEST = 2
# It was right and did not work: a disk that is full, a hub that does not answer, an error in the middle of the work.
FAILED = 1
MISTAKES = (AdapterError, ValueError, NotImplementedError, NotADirectoryError)


def say(message: str) -> None:
    """Print a line of a report, however long, without breaking it."""
    out.print(message, highlight=False, soft_wrap=True)


def note(message: str) -> None:
    """Tell what somebody may want to know before the work, beside the report."""
    err.print(Text.assemble(("note:", "bold"), " ", message), highlight=False, soft_wrap=True)


def fail(message: str, status: int = WRONG_REQUEST) -> NoReturn:
    """Tell a mistake and leave; among several processes, tell the others."""
    if (group := current()) is not None:
        group.peers.end(PEER_FAILED, message)
    err.print(Text.assemble(("error:", "bold red"), " ", message), highlight=False, soft_wrap=True)
    raise typer.Exit(status)


@contextmanager
def errors() -> Iterator[None]:
    """Mistakes in the input, and what the system refuses, end with one line; anything else keeps its traceback."""
    try:
        yield
    except MISTAKES as error:
        fail(str(error))
    except ModuleError as error:
        # A mistake in the code, which its traceback tells best, is no matter of the input.
        if not isinstance(error.__cause__, (*MISTAKES, OSError)):
            raise
        fail(str(error), FAILED)
    except OSError as error:
        fail(str(error), FAILED)


@contextmanager
def progress_bars() -> Iterator[Callable[[str], Callable[..., None]]]:
    """A bar with an estimate; yields a maker of `report(done, total)` callbacks, which take a note as well."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=err) as progress:

        def start(what: str) -> Callable[[int, int], None]:
            task = progress.add_task(what, total=None)

            def report(done: int, total: int, note: str = "") -> None:
                progress.update(task, completed=done, total=total, description=f"{what}: {note}" if note else what)

            return report

        yield start
