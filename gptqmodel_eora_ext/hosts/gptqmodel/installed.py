"""Whether the seams are in place: `seams` records it here and the adapter asks here; neither imports the other."""

from __future__ import annotations

from ..seam import SeamError, Undo

# How to undo what was done, the last first; empty while nothing is installed.
undo: list[Undo] = []
_failure: SeamError | None = None


def record_failure(error: SeamError | None) -> None:
    """Remember why the host cannot be served; None once it can."""
    global _failure
    _failure = error


def is_installed() -> bool:
    """Whether the seams are in place."""
    return bool(undo)


def require_installed() -> None:
    """Raise unless the seams are in place.

    Raises:
        SeamError: telling why the installed GPTQModel cannot be served, or that nothing has installed the plugin.
    """
    if _failure is not None:
        raise _failure
    if not undo:
        raise SeamError("The plugin is not installed into GPTQModel. Import EoRA from `gptqmodel_eora_ext`.")
