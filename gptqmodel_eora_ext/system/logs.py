"""Which log lines are shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_from(level: int, logger: str) -> Iterator[None]:
    """Leave out a logger's lines below a level within the block; where fewer are shown already, that stays so.

    The level is set in any case: it may hold by the root logger's alone, which libraries change when they are imported.
    """
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(max(level, log.getEffectiveLevel()))
    try:
        yield
    finally:
        log.setLevel(before)
