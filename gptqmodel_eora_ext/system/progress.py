"""How far a long step is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any


def counted(report: Callable[[int, int], None]) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """Wrap a sequence so that ``report`` hears how far it is."""

    def wrap(items: Iterable[Any]) -> Iterator[Any]:
        known = list(items)
        for done, item in enumerate(known):
            report(done, len(known))
            yield item
        report(len(known), len(known))

    return wrap
