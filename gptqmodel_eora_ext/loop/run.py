"""One run of compensation, in whichever host: what is asked, what has been found so far, and what is told about it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..adapter.compensate import Recipe
from ..adapter.factors import ModuleFactors
from ..adapter.naming import name_adapter
from ..adapter.options import AdapterOptions
from ..adapter.save import save_adapter
from .allocation import RankAllocation

# Libraries whose versions are written into an adapter's `eora.json`, beside the host's.
LIBRARIES = ("torch", "transformers", "peft")


class ModuleError(RuntimeError):
    """Quantising or compensating a module failed; the error that it met is the cause.

    Attributes:
        module: its full name.
        finished: full module name → factors, of the modules that were done before.
    """

    def __init__(self, module: str, cause: Exception, finished: Mapping[str, ModuleFactors]) -> None:
        self.module = module
        self.finished = dict(finished)
        super().__init__(
            f"EoRA: stopped at {module}, after {len(self.finished)} modules: {type(cause).__name__}: {cause}"
        )


class Run:
    """State of one run. Safe to write to from several threads.

    Args:
        options: what is asked of the adapter, settled.

    Attributes:
        rank: rank of a module that does not choose: what was asked, or the one that a budget allows for all.
        allocation: gives out a budget; None without one, and until forecasts are made.
        factors: full module name → factors, on the CPU.
        seconds: spent on factors so far, summed over threads.
        calibration: what `describe_calibration` found.
        failure: module's name and error, of the first that `guarded` met.
    """

    def __init__(self, options: AdapterOptions) -> None:
        assert options.rank is not None
        self.options = options
        self.rank = options.rank
        self.allocation: RankAllocation | None = None
        self.factors: dict[str, ModuleFactors] = {}
        self.seconds = 0.0
        self.calibration: dict[str, Any] = {}
        self.failure: tuple[str, Exception] | None = None
        self._lock = threading.Lock()

    def recipe(self, name: str, fixed_rank: int | None = None, *, first: bool = True) -> Recipe:
        """What a module's factors should be.

        Args:
            name: full module name.
            fixed_rank: in place of the rank that was asked, for a module that does not choose.
            first: whether this is the module's first round; a rank under a budget is chosen then and kept afterwards.
        """
        objective, factor_bits = self.options.objective, self.options.factor_bits
        if self.allocation is not None and name in self.allocation.options:
            most = self.allocation.options[name].ranks[-1]
            choose = functools.partial(self.allocation.choose if first else self.allocation.strongest, name)
            return Recipe(most, objective, factor_bits, choose, layout=self.options.layout)
        rank = self.rank if fixed_rank is None else fixed_rank
        # Under a budget the rank is "auto"; a module that was not forecast then gets no adapter.
        return Recipe(rank if isinstance(rank, int) else 0, objective, factor_bits, layout=self.options.layout)

    def record(self, name: str, factors: ModuleFactors) -> None:
        """Keep a module's factors, on the CPU."""
        with self._lock:
            self.factors[name] = factors.to("cpu")

    @contextlib.contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Remember an error in place of raising it, for work in a host's thread, where it would not reach the caller.

        `raise_failure` raises it where it does.

        Args:
            name: full module name.
        """
        try:
            yield
        except Exception as error:
            with self._lock:
                self.failure = self.failure or (name, error)

    def raise_failure(self) -> None:
        """Raise what `guarded` has met; to be called on the thread of the run's caller.

        Raises:
            ModuleError: where `guarded` has met an error.
        """
        if self.failure is not None:
            name, error = self.failure
            raise ModuleError(name, error, self.factors) from error

    def took(self, seconds: float) -> None:
        """Count seconds spent on factors."""
        with self._lock:
            self.seconds += seconds

    def describe_calibration(self, windows: Iterable[tuple[torch.Tensor, int]]) -> None:
        """Fingerprint the calibration data, so that an adapter tells what it was made on.

        Args:
            windows: of each batch, its token ids (integers of any shape) and how many of them count.
        """
        self.calibration = fingerprint_windows(windows)

    def describe(self, method: str, host: str, **more: Any) -> dict[str, Any]:
        """What goes into `eora.json` beside the per-module report.

        Args:
            method: how the model was quantised.
            host: the host's distribution, whose version is told.
            more: what only this host tells.
        """
        told: dict[str, Any] = {
            "objective": self.options.objective, "factor_bits": self.options.factor_bits, "rank": self.rank, **more
        }  # fmt: skip
        if self.allocation is not None:
            told["allocation"] = {**self.allocation.report(), "sensitivity": self.options.sensitivity}
        return {
            **told,
            "method": method,
            "calibration": self.calibration,
            "seconds": round(self.seconds, 3),
            "versions": {
                "gptqmodel-eora-ext": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in (host, *LIBRARIES)},
            },
        }


def write_adapter(
    checkpoint: Path,
    folder: Path,
    factors: Mapping[str, ModuleFactors],
    module_names: Collection[str],
    details: Mapping[str, Any],
    *,
    base_model: Path | None = None,
) -> None:
    """Write an adapter's folder, and name it in its checkpoint where it lies inside.

    Args:
        checkpoint: the quantised model's folder.
        folder: the adapter's.
        factors: full module name → factors.
        module_names: every module of the model.
        details: of `Run.describe`.
        base_model: where ``checkpoint`` will be, when it is written elsewhere first.

    Raises:
        OSError: when a file cannot be written.
    """
    place = base_model or checkpoint
    # In the model's order: threads have recorded them in any.
    factors = {name: factors[name] for name in dict.fromkeys((*module_names, *factors)) if name in factors}
    save_adapter(folder, factors, base_model=str(place), module_names=module_names, details=details)
    name_adapter(checkpoint, folder, factors, known_as=place)


def fingerprint_windows(windows: Iterable[tuple[torch.Tensor, int]]) -> dict[str, Any]:
    """Number of batches and of tokens that count, and a digest of the token ids: by which data is recognised.

    Args:
        windows: of each batch, its token ids (integers of any shape) and how many of them count.
    """
    digest = hashlib.sha256()
    batches = tokens = 0
    for ids, counted in windows:
        digest.update(ids.to(torch.int64).cpu().numpy().tobytes())
        batches, tokens = batches + 1, tokens + counted
    return {"batches": batches, "tokens": tokens, "sha256": digest.hexdigest()}


def counted_tokens(batches: Sequence[Mapping[str, Any]]) -> Iterable[tuple[torch.Tensor, int]]:
    """Token ids of each batch, and how many of them its attention mask counts: for `Run.describe_calibration`."""
    for batch in batches:
        ids = torch.as_tensor(batch["input_ids"])
        mask = batch.get("attention_mask")
        yield ids, int(torch.as_tensor(mask).sum()) if mask is not None else ids.numel()
