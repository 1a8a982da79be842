"""The error of adapters that cannot be used, and the reading of their JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..formats.numbers import LARGEST_INTEGER, is_whole


class AdapterError(ValueError):
    """An adapter folder that cannot be used; the message tells what was found and what would do."""


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        AdapterError: when the file cannot be read, or holds anything but an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"Adapter: `{path}` cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise AdapterError(f"Adapter: `{path}` holds a {type(content).__name__}, expected an object.")
    return content


class Fields:
    """The fields of a JSON object, each checked when it is asked for.

    Args:
        content: the object.
        where: the file, and the place in it, for messages.
        remedy: what to do about a wrong value.
    """

    def __init__(self, content: Mapping[str, Any], where: str, remedy: str) -> None:
        self.content = content
        self.where = where
        self.remedy = remedy

    def wrong(self, name: str, expected: str) -> AdapterError:
        """The error for a field's value."""
        found = repr(self.content[name]) if name in self.content else "nothing"
        shown = found if len(found) <= 100 else f"{found[:100]}…"
        return AdapterError(f"Adapter: {self.where} says {name} = {shown}; expected {expected}. {self.remedy}")

    def whole(self, name: str, *, least: int) -> int:
        """An integer of at least ``least``."""
        value: Any = self.content.get(name)
        if not is_whole(value, least):
            raise self.wrong(name, "a positive integer" if least == 1 else f"an integer of at least {least}")
        return int(value)

    def number(self, name: str, default: float | None = None, *, least: float = -math.inf) -> float:
        """A finite number of at least ``least``; ``default`` where there is none and one is given."""
        value: Any = self.content.get(name) if name in self.content or default is None else default
        if not is_number(value) or value < least:
            raise self.wrong(name, "a finite number" + (f" of at least {least:g}" if least > -math.inf else ""))
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; false where there is none, or null."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        """A string, or None."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; an empty one where there is none, or null."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value or {}

    def below(self, name: str, place: str) -> Fields:
        """The fields of an object inside this one."""
        return Fields(self.mapping(name), f"{self.where} {place}", self.remedy)


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a finite number; true and false are none, and neither are NaN and Infinity."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER
