"""GPTQModel's terminal output, replaced by one progress bar where a command shows its own.

It stands outside `hosts.gptqmodel`, whose import brings in GPTQModel and with it a banner.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..system.logs import only_from

# Lines that other libraries log, on which nobody who runs a command can act: logger → a part of the message.
NOISE = {
    # torchao registers its own classes in a way that torch has since made needless.
    "torch.utils._pytree": "is an Enum subclass and is now natively supported by torch.compile",
    # A build of torch for CUDA on a machine without a GPU; the commands tell the device where it matters.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    # GPTQModel's tokenizer helper names the padding token that it chose; windows here are never padded.
    "tokenicer.tokenicer": "Auto fixed pad_token_id",
    # GPTQModel asks where an empty model will lie, before its output matrix is tied to the embeddings.
    "accelerate.utils.modeling": "The model weights are not tied",
}
# AutoRound sets this logger's level when it is imported, so its lines are kept back by a filter.
AUTOROUND_LOGGER = "autoround"


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Keep lines of `NOISE` from being shown within the block, every other line of the same loggers is shown; of
    AutoRound errors alone."""

    def keeps(record: logging.LogRecord) -> bool:
        return NOISE[record.name] not in record.getMessage()

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    filters = [(name, keeps) for name in NOISE] + [(AUTOROUND_LOGGER, is_error)]
    for name, filtered in filters:
        logging.getLogger(name).addFilter(filtered)
    try:
        yield
    finally:
        for name, filtered in filters:
            logging.getLogger(name).removeFilter(filtered)


@contextlib.contextmanager
def without_library_bars() -> Iterator[None]:
    """Keep bars of transformers and AutoRound from being shown within the block, where a command has one of its own.

    transformers' are about files that are written within a second; AutoRound's would share their line with the events
    of `--log-json`.
    """
    from tqdm.std import tqdm
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    begin = tqdm.__init__

    @functools.wraps(begin)
    def hidden(bar: tqdm, *args: Any, **kwargs: Any) -> None:
        begin(bar, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = begin
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show only errors of GPTQModel and AutoRound within the block: no banner, table or print of GPTQModel's own, no
    bars but the command's, and no `NOISE`.

    Of this package's own log, warnings and errors are shown: a command says itself what it does.
    """
    own = only_from(logging.WARNING, __package__.split(".")[0])
    with own, without_noise(), without_library_bars(), _host_quiet():
        yield


@contextlib.contextmanager
def _host_quiet() -> Iterator[None]:
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
    """A layer callback for GPTQModel that tells how many layers are done.

    Args:
        report: called with (layers done, layers in all).
        total: layers in all.
    """

    def __init__(self, report: Callable[[int, int], None], total: int) -> None:
        self.report = report
        self.total = total
        self.done = 0

    def go_on(self, done: int) -> None:
        """Called where so many layers were finished by an interrupted run."""
        self.done = done
        self.report(self.done, self.total)

    def layer_complete(self, *, layer_idx: int, submodule_finalized: bool) -> None:
        """Called twice a layer: when it is quantised, and when it is packed."""
        if not submodule_finalized:
            self.done += 1
            self.report(self.done, self.total)


def watch_layers(model: Any, report: Callable[[int, int], None]) -> None:
    """Have ``report`` called with (layers done, layers in all) after each layer of a GPTQModel model."""
    from .gptqmodel.modules import layer_names

    # Counted on the model, since configs of models that also see or hear tell no number of layers.
    total = len(layer_names(model)) + int(bool(model.quantize_config.lm_head))
    model.layer_callback = LayerProgress(report, total)
