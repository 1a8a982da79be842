"""Launching a kernel again without Triton's look at every argument, which takes longer than two small kernels run.

Triton compiles a variant for the dtypes of its arguments, for pointers and sizes that are multiples of 16, for sizes of
1, and for constants. Who launches knows when none of these has changed since the last time, and says so by a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from triton.runtime.jit import JITFunction

Known = dict[Any, tuple[Any, tuple[Any, ...]]]


def launch(
    known: Known,
    key: Any,
    kernel: JITFunction,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Launch a kernel on the current device.

    Args:
        known: what was compiled, by key.
        key: tells variants apart: dtypes, sizes, constants and options; None to let Triton look.
        kernel: with all constants after all arguments.
        grid: programs along each axis.
        arguments: pointers and numbers, in the kernel's order.
        constants: in the kernel's order.
        options: warps, stages and so on.
    """
    if key is not None and key in known:
        compiled, values = known[key]
        compiled[grid](*arguments, *values)
        return
    compiled = kernel[grid](*arguments, **constants, **options)
    # Interpreted kernels are not compiled.
    if key is not None and compiled is not None:
        known[key] = compiled, tuple(constants.values())
