"""What a loop over layers keeps so that an interrupted run goes on after its last finished layer (docs/resume.md).

A layer's results (its factors, and what the host has made of its weights) are kept in a file of their own, once. What
the next layer starts from (the activations that enter it, what is left of a budget, random generators) is one more
file, replaced after each layer: it tells how many layers are finished, so a layer counts as finished once it is whole.

Activations are stored, not computed anew from the finished layers. Computing them would run every finished layer again,
by weights that were packed meanwhile, whose products differ in the last bit from those that the loop has computed with.
They are one layer's, tokens × width, whatever the depth of the model.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .._version import __version__
from ..adapter.factors import ModuleFactors
from ..formats.factors import QuantizedFactor
from ..system.distributed import as_first_says, is_first
from ..system.files import write_json
from ..system.interrupt import asked_to_stop
from ..system.kept import RUN, Kept, ResumeError, differences, kept_state
from .run import LIBRARIES, Run

log = logging.getLogger(__name__)

# The file of what the next layer starts from.
NEXT = "next"
# The mark of a checkpoint that is written, beside which there is more to do.
WRITTEN = "written.json"
# Figures of a module's factors, beside the factors themselves.
FIGURES = ("requested_rank", "tokens", "signal", "error_before", "error_after")


class Keeping:
    """Where a run keeps its state, and whether one that was interrupted is to be gone on with.

    A context: it holds what `open` has opened until its block ends. Several processes that share a run each have one,
    and call its methods in the same order; rank 0 alone keeps something, and the others hear from it what they need.

    Args:
        root: the folder.
        begin_anew: whether what an interrupted run has left is removed.
        required: whether it is an error when there is nothing to go on with.
        every: layers between two that are kept.
        strict: whether another device or number of threads is refused; otherwise it is told, since it changes results
            by rounding alone.
        lasting: whether `finish` leaves it to the caller, who has more to do, to `remove` what is kept.

    Attributes:
        kept: what `open` has opened; None in the others of several processes.
        stopping: tells whether this process is asked to end.
    """

    def __init__(
        self,
        root: Path,
        *,
        begin_anew: bool = False,
        required: bool = False,
        every: int = 1,
        strict: bool = False,
        lasting: bool = False,
    ) -> None:
        self.root = root
        self.every = every
        self.lasting = lasting
        self.kept: Kept | None = None
        self.stopping: Callable[[], bool] = lambda: False
        self._begin_anew, self._required, self._strict = begin_anew, required, strict
        self._stack = contextlib.ExitStack()

    def open(self, asked: Mapping[str, Any]) -> Kept:
        """Open the folder for a run.

        Args:
            asked: all that its result depends on, ready for JSON; versions, devices and threads are added here.

        Raises:
            ResumeError: where the folder is of another run, of another version, or in use.
        """
        if self._required and not self.exists:
            raise ResumeError(f"EoRA: there is nothing to go on with in `{self.root}`, and resuming is required.")
        computed_on = {"threads": torch.get_num_threads(), "devices": _devices()}
        everything = {**asked, "versions": _versions(), **({"computed on": computed_on} if self._strict else {})}
        kept = kept_state(
            self.root,
            everything,
            begin_anew=self._begin_anew,
            remedy=f"Begin anew: `--restart`, or remove `{self.root}`.",
            tell_soft=lambda text: log.warning(
                "EoRA: the interrupted run was computed elsewhere (%s), so results may differ in the last bits.", text
            ),
            soft={} if self._strict else computed_on,
        )
        self.kept = self._stack.enter_context(kept)
        self.stopping = self.kept.stopping
        if self.kept.goes_on:
            log.info("EoRA: an interrupted run in `%s` is gone on with.", self.root)
        return self.kept

    def open_by_first(self, asked: Mapping[str, Any]) -> None:
        """As `open`, for several processes that share the run: rank 0 opens the folder, all fail where it fails.

        In the others, too, a first SIGTERM or Ctrl-C only tells ``stopping`` from now on.
        """
        if not is_first():
            self.stopping = self._stack.enter_context(asked_to_stop())

        def opened() -> None:
            self.open(asked)

        as_first_says(opened, ResumeError)

    def finish(self) -> None:
        """Called once what the run has made is written."""
        if not self.lasting:
            self.remove()

    def remove(self) -> None:
        """Remove what is kept."""
        if is_first():
            shutil.rmtree(self.root, ignore_errors=True)

    def mark_written(self, request: Mapping[str, Any]) -> None:
        """Called once a checkpoint is written and more is to be done with it: its layers are wanted no more.

        Of a run that has kept nothing, as where no module gets an adapter, there is nothing to mark.

        Args:
            request: all that was asked, ready for JSON, by which `is_written` recognises the same call.
        """
        if not is_first() or not self.exists:
            return
        write_json(self.root / WRITTEN, request)
        for file in self.root.glob("*.safetensors"):
            file.unlink()

    def is_written(self, request: Mapping[str, Any]) -> bool:
        """Whether an interrupted call that asked the same has written its checkpoint, so that only the rest is to do.

        Raises:
            ResumeError: for one that asked something else.
        """
        return as_first_says(lambda: self._is_written(request), ResumeError)

    def _is_written(self, request: Mapping[str, Any]) -> bool:
        file = self.root / WRITTEN
        if self._begin_anew or not file.is_file():
            return False
        unlike = differences(json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(request)))
        if unlike:
            raise ResumeError(
                f"EoRA: `{self.root}` was left by an interrupted run that was asked something else "
                f"({'; '.join(unlike)}). Ask the same again, and it goes on. Begin anew: `--restart`."
            )
        return True

    @property
    def exists(self) -> bool:
        """Whether an interrupted run has left something."""
        return (self.root / RUN).is_file()

    def __enter__(self) -> Keeping:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def layer_file(number: int) -> str:
    """The name of a layer's file."""
    return f"layer-{number:05d}"


def run_state(run: Run) -> dict[str, Any]:
    """What a run knows beside its factors, for `load_run_state`."""
    return {
        "rank": run.rank,
        "seconds": run.seconds,
        "allocation": None if run.allocation is None else run.allocation.state(),
    }


def load_run_state(run: Run, state: Mapping[str, Any]) -> None:
    """Go on where another process stopped; an allocation has to be there, made from the same forecasts."""
    run.rank, run.seconds = state["rank"], state["seconds"]
    if run.allocation is not None:
        run.allocation.load_state(state["allocation"])


def factors_state(factors: Mapping[str, ModuleFactors], names: Iterable[str]) -> dict[str, Any]:
    """Factors of some modules, for a state file."""
    return {
        name: {
            "lora_A": one.lora_A,
            "lora_B": one.lora_B,
            "packed": None if one.packed is None else [_packed_state(factor) for factor in one.packed],
            **{key: getattr(one, key) for key in FIGURES},
        }
        for name in names
        for one in [factors[name]]
    }


def read_factors(state: Mapping[str, Any]) -> dict[str, ModuleFactors]:
    """What `factors_state` was made of."""
    found = {}
    for name, one in state.items():
        packed = one["packed"] and tuple(QuantizedFactor(**factor) for factor in one["packed"])
        found[name] = ModuleFactors(one["lora_A"], one["lora_B"], packed=packed, **{key: one[key] for key in FIGURES})
    return found


def _packed_state(factor: QuantizedFactor) -> dict[str, Any]:
    return {
        "codes": factor.codes, "scales": factor.scales, "bits": factor.bits, "features": factor.features,
        "group_size": factor.group_size,
    }  # fmt: skip


def _versions() -> dict[str, str]:
    return {"gptqmodel-eora-ext": __version__, **{name: version(name) for name in LIBRARIES}}


def _devices() -> list[str]:
    """The processor by what torch uses of it, and every GPU."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}", *gpus]
