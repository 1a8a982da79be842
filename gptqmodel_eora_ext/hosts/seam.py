"""Seams: the places where the plugin touches a host. Checked before use, put in place all or none, undone exactly."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

log = logging.getLogger(__name__)

Undo = Callable[[], None]


class SeamError(RuntimeError):
    """The plugin cannot serve the installed host, or is not installed into it; the message says what to do."""


def problem_at(owner: Any, name: str, parameters: tuple[str, ...]) -> str | None:
    """What is wrong with an attribute of a host that the plugin relies on, or None.

    Args:
        owner: module or class.
        name: the attribute.
        parameters: names that its signature must hold; none for what is not called.
    """
    where = f"{getattr(owner, '__qualname__', owner.__name__)}.{name}"
    value = getattr(owner, name, None)
    if value is None:
        return f"{where} is missing"
    missing = set(parameters) - set(inspect.signature(value).parameters) if parameters else set()
    return f"{where} lacks the parameters {sorted(missing)}" if missing else None


@dataclass(frozen=True)
class Seam:
    """One attribute of a host that is replaced.

    Attributes:
        owner: module or class.
        name: the attribute.
        parameters: names that the attribute's signature must hold.
        replacement: takes the original, returns what stands in its place.
    """

    owner: Any
    name: str
    parameters: tuple[str, ...]
    replacement: Callable[[Any], Any]

    def problem(self) -> str | None:
        """What is wrong with the host at this place, or None."""
        return problem_at(self.owner, self.name, self.parameters)

    def apply(self) -> Undo:
        """Replace the attribute, and return what undoes that exactly: one that was inherited is inherited again."""
        inherited = self.name not in vars(self.owner)
        own = vars(self.owner).get(self.name)
        setattr(self.owner, self.name, self.replacement(getattr(self.owner, self.name)))

        def restore() -> None:
            if inherited:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, own)

        return restore


@dataclass(frozen=True)
class HostVersion:
    """A host's version, and the versions that the plugin knows.

    Attributes:
        package: the host's distribution.
        found: the version that is installed.
        oldest: the oldest that the plugin serves.
        newest_tested: the newest that it was tested with.
    """

    package: str
    found: Version
    oldest: Version
    newest_tested: Version

    def check(self) -> None:
        """Refuse a host that is too old; warn about one that is newer than tested.

        Raises:
            SeamError: below the oldest supported version.
        """
        if self.found < self.oldest:
            raise SeamError(
                f"gptqmodel-eora-ext is not active in {self.package}: it needs {self.package} >= {self.oldest}, found "
                f"{self.found}. pip install -U {self.package}"
            )
        if self.found > self.newest_tested:
            log.warning("%s %s is newer than the tested %s; its shape is checked, its behaviour is not.",
                        self.package, self.found, self.newest_tested)  # fmt: skip

    def require(self, problems: Sequence[str]) -> None:
        """Refuse a host whose attributes differ from what the plugin relies on.

        Args:
            problems: what was found wrong, one sentence each; none for a host that fits.

        Raises:
            SeamError: with every mismatch found.
        """
        if problems:
            raise SeamError(
                f"gptqmodel-eora-ext is not active in {self.package}: {self.package} {self.found} differs from the "
                f"tested {self.newest_tested}: {'; '.join(problems)}. Install {self.package}=={self.newest_tested}, "
                f"or a newer gptqmodel-eora-ext."
            )


@contextmanager
def all_or_none(undo: list[Undo]) -> Iterator[None]:
    """Where the block ends with an error, undo what it has appended to ``undo``; the error goes on to the caller."""
    before = len(undo)
    try:
        yield
    except BaseException:
        undo_all(undo, down_to=before)
        raise


def undo_all(undo: list[Undo], *, down_to: int = 0) -> None:
    """Call and remove the entries of ``undo``, the last first, until ``down_to`` are left."""
    while len(undo) > down_to:
        undo.pop()()
