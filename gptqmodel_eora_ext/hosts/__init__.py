"""The only modules that import a host library. Each host's folder or file lists the seams it uses."""

from __future__ import annotations

import inspect
from typing import Any


class SeamError(RuntimeError):
    """A host that the plugin cannot serve."""


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
