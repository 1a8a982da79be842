"""Seconds spent in functions of a library, which are replaced by timed ones."""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Seconds spent in functions, by a name; threads add up.

    Args:
        settle: called before the clock is read, for instance to wait for a GPU.
        nested: whether a watched function inside another is counted, too. Of one name the outermost alone counts.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None, *, nested: bool = True) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._settle = settle
        self._nested = nested
        self._running = threading.local()
        self._lock = threading.Lock()

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Replace a function by one that is timed."""
        original = getattr(owner, attribute)
        counted = name if self._nested else "all"

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._running, counted, False):
                return original(*args, **kwargs)
            setattr(self._running, counted, True)
            self._settle()
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._settle()
                setattr(self._running, counted, False)
                with self._lock:
                    self.seconds[name] += time.perf_counter() - start

        setattr(owner, attribute, timed)

    def take(self) -> dict[str, float]:
        """What was counted since the last call."""
        taken = {name: round(value, 4) for name, value in self.seconds.items()}
        self.seconds.clear()
        return taken
