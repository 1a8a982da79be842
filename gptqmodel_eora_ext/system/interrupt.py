"""Ending a long run between two of its steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Signals by which a person or a scheduler asks a process to end.
ASKING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed or SIGTERM came within the block, which end nothing there.

    The second one does what it usually does: Ctrl-C raises KeyboardInterrupt, SIGTERM ends the process. In a thread
    that is not the main one, which signals do not reach, the function is always false.

    Example:
        >>> with asked_to_stop() as stopping:
        ...     while work and not stopping():
        ...         work.pop()
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = threading.Event()
    usual = {number: signal.getsignal(number) for number in ASKING}

    def put_back() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        pressed.set()
        put_back()

    for number in ASKING:
        signal.signal(number, note)
    try:
        yield pressed.is_set
    finally:
        put_back()
