"""Sweeps that outlive their process: layers that are forecast are kept in the user's cache until the sweep is done.

A sweep is recognised by a digest of all that its result depends on (rows of the weights, tokens, what is asked of every
module, versions), so that the same call goes on where it was interrupted and any other one begins by itself. What a
finished sweep has found is kept as well, some megabytes, since the run that asked for it may be killed later on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..system.distributed import as_first_says, current
from ..system.files import cache_folder
from ..system.interrupt import asked_to_stop
from ..system.kept import InUse, Kept, ResumeError, Stopped, kept_state
from ..system.sent_state import from_first, joined, receive_state, send_state, shared_out
from .forecast import Forecast
from .layered import LayeredModel
from .ranks import TokenCorrection
from .sensitivity import Sensitivity, fingerprint
from .sweep import Question, Sweeping, Swept

log = logging.getLogger(__name__)

FOLDER = "sweeps"
FORMAT = "eora-sweep-1"
NEXT, FOUND = "next", "found"
# What nobody has touched for so long is removed: an abandoned sweep's activations take as much as one layer's.
FORGOTTEN_AFTER_DAYS = 30


@contextlib.contextmanager
def kept_sweep(
    model: LayeredModel,
    modules: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    kind: str,
    question: Question,
) -> Iterator[LayersKept | None]:
    """Open what is kept of a sweep; None where it cannot be recognised, or where another run is at it.

    Of several processes that share a sweep rank 0 opens it, in its own cache; the others hear from it what they need.

    Args:
        model: run layer by layer.
        modules: full names of linear layers.
        batches: all data that the sweep reads.
        kind: of sensitivity.
        question: what to forecast.
    """
    if not (question.rounds or question.source):
        yield None
        return
    digest = hashlib.sha256(fingerprint(model, modules, batches, kind).encode())
    digest.update(json.dumps(_described(modules, question)).encode())
    root = cache_folder() / FOLDER / digest.hexdigest()
    with contextlib.ExitStack() as stack:
        kept: list[Kept] = []

        def opened() -> bool:
            _forget(root.parent)
            asked = {"version": __version__, "torch": torch.__version__}
            with contextlib.suppress(InUse):
                kept.append(stack.enter_context(kept_state(root, asked, supersede=True)))
            return bool(kept)

        if not as_first_says(opened, ResumeError):
            yield None
        elif kept:
            yield LayersKept(root, kept[0], kept[0].stopping)
        else:
            yield LayersKept(root, None, stack.enter_context(asked_to_stop()))


class LayersKept:
    """Keeps a sweep's layers: `plan.sweep.SweepKeeper`. Of several processes, which call it at the same moments, rank 0
    keeps what one process would, so that any number of them goes on.

    Args:
        root: the folder.
        kept: opened there; None in the others of several processes.
        stopping: tells whether this process is asked to end.
    """

    def __init__(self, root: Path, kept: Kept | None, stopping: Callable[[], bool]) -> None:
        self._root, self._kept, self._stopping = root, kept, stopping
        self._group = current()

    def found(self, sensitivity: Sensitivity | None) -> Swept | None:
        """What a finished sweep has found, without going through the model again."""
        state = self._read(FOUND)
        if state is None:
            return None
        log.info("EoRA: forecasts from `%s`.", self._root)
        all_of_it = Sweeping({}, {}, {}, (), None)
        _take(state["modules"], all_of_it)
        moments = all_of_it.relative if sensitivity is None else sensitivity
        return Swept(all_of_it.forecasts, state["divergences"], moments, state["tokens"], all_of_it.reached)

    def finish(self, found: Swept, layers: int) -> None:
        """Keep what was found, in place of so many layers."""
        if self._kept is None:
            return
        relative = {} if isinstance(found.output_moments, Sensitivity) else dict(found.output_moments)
        all_of_it = Sweeping(dict(found.forecasts), relative, dict(found.reached), (), None)  # type: ignore[arg-type]
        state = {"modules": _given(list(found.forecasts), all_of_it), "divergences": dict(found.divergences),
                 "tokens": found.tokens}  # fmt: skip
        self._kept.keep(FOUND, state)
        for name in (NEXT, *map(_layer, range(layers))):
            self._kept.drop(name)

    def go_on(self, under_way: Sweeping) -> int:
        """See `SweepKeeper`."""
        state = self._read(NEXT)
        if state is None:
            return 0
        layers: int = state["layers"]
        for number in range(layers):
            _take(self._read(_layer(number), required=True), under_way)
        streams = {"hidden": state["hidden"], "kinds": state["kinds"]}
        if self._group is not None:
            streams = shared_out(streams, self._group.size, self._group.rank)
        for window, hidden in zip(under_way.windows, streams["hidden"], strict=True):
            window.hidden = hidden
        if under_way.kinds is not None:
            under_way.kinds.load_state(streams["kinds"])
        log.info("EoRA: %d layers were forecast before the run was interrupted.", layers)
        return layers

    def keep(self, index: int, names: Sequence[str], under_way: Sweeping) -> None:
        """See `SweepKeeper`."""
        kinds = None if under_way.kinds is None else under_way.kinds.state()
        streams = {"hidden": [window.hidden for window in under_way.windows], "kinds": kinds}
        group = self._group
        if group is not None and not group.is_first:
            send_state(group, streams, 0)
        elif group is not None:
            others = [receive_state(group, rank, stays=True) for rank in range(1, group.size)]
            streams = joined([streams, *others])
        if self._kept is not None:
            self._kept.keep(_layer(index), _given(names, under_way))
            self._kept.keep(NEXT, {"layers": index + 1, **streams})
        stops = self._stopping()
        if stops if group is None else any(group.gather(stops)):
            raise Stopped(self._root)

    def _read(self, name: str, *, required: bool = False) -> Any:
        """What is kept under a name, in all processes; None where there is nothing, an error if it is ``required``."""
        read: list[Any] = []

        def look() -> bool:
            if self._kept is not None and (required or name in self._kept):
                read.append(self._kept.read(name))
            return bool(read)

        if not as_first_says(look, ResumeError):
            return None
        if self._group is None:
            return read[0]
        return from_first(self._group, read[0] if read else None)


def _layer(number: int) -> str:
    return f"layer-{number:05d}"


def _given(names: Sequence[str], under_way: Sweeping) -> dict[str, Any]:
    """What was found of some modules, for a state file."""
    return {
        "forecasts": {
            name: {
                bits: (one.total, one.gains, one.correction.head, one.correction.tail)
                for bits, one in under_way.forecasts[name].items()
            }
            for name in names
        },
        "relative": {name: under_way.relative[name] for name in names if name in under_way.relative},
        "reached": {name: under_way.reached[name] for name in names if name in under_way.reached},
    }


def _take(modules: Mapping[str, Any], under_way: Sweeping) -> None:
    """The reverse of `_given`."""
    for name, widths in modules["forecasts"].items():
        under_way.forecasts[name] = {
            bits: Forecast(total, gains, TokenCorrection(head, tail))
            for bits, (total, gains, head, tail) in widths.items()
        }
    under_way.relative.update(modules["relative"])
    under_way.reached.update(modules["reached"])


def _described(modules: Sequence[str], question: Question) -> list[Any]:
    """What is asked, ready for JSON."""
    asked = []
    for name in modules:
        how = question.rounding(name)
        asked.append([name, repr(how), [question.rank(name, bits) for bits in how.bits]])
    return [FORMAT, asked, question.uniform, question.weighed, question.source, __version__, torch.__version__]


def _forget(folder: Path) -> None:
    """Remove what was kept of sweeps that nobody has come back to."""
    if not folder.is_dir():
        return
    oldest = time.time() - FORGOTTEN_AFTER_DAYS * 86400
    for root in folder.iterdir():
        if root.is_dir() and max((one.stat().st_mtime for one in root.iterdir()), default=0.0) < oldest:
            shutil.rmtree(root, ignore_errors=True)
