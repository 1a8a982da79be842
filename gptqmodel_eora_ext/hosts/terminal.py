"""GPTQModel's terminal output, replaced by one progress bar where a command shows its own.

It stands outside `hosts.gptqmodel`, whose import brings in GPTQModel and with it a banner.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Only errors of GPTQModel; no banner, no tables, no bars of its own, no prints."""
    from logbar import LogBar

    shared = LogBar.shared()
    level = shared.level
    # Before GPTQModel is imported, which prints a banner.
    shared.setLevel("ERROR")
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        from gptqmodel.utils import logger

        suppress = logger._suppress_live_renderables
        logger._suppress_live_renderables = lambda: True
        try:
            yield
        finally:
            logger._suppress_live_renderables = suppress
            shared.setLevel(level)


class LayerProgress:
    """GPTQModel's layer callback: tells how many layers are done.

    Args:
        report: called with (layers done, layers in all).
        total: layers in all.
    """

    def __init__(self, report: Callable[[int, int], None], total: int) -> None:
        self.report = report
        self.total = total
        self.done = 0

    def layer_complete(self, *, layer_idx: int, submodule_finalized: bool) -> None:
        """Called twice a layer: when it is quantised, and when it is packed."""
        if not submodule_finalized:
            self.done += 1
            self.report(self.done, self.total)


def watch_layers(model: Any, report: Callable[[int, int], None]) -> None:
    """Have ``report`` called after each layer of a GPTQModel model."""
    total = int(model.model.config.num_hidden_layers) + int(bool(model.quantize_config.lm_head))
    model.layer_callback = LayerProgress(report, total)
