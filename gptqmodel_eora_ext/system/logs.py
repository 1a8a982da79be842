"""Which log lines are shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_from(level: int, logger: str) -> Iterator[None]:
    """Leave out a logger's lines below a level within the block; where fewer are shown already, that stays so."""
    log = logging.getLogger(logger)
    before = log.level
    if log.getEffectiveLevel() < level:
        log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)
