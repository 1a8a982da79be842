"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back_freed() -> None:
    """Have the C library give freed memory back to the system, where it can be asked to (glibc).

    It keeps what is freed in pieces for the next who asks; after loading a model that is a quarter of the model's size,
    and takes some milliseconds to give back.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
