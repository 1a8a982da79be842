"""What is asked of hosts, and what they give: the terms between commands and `hosts.registry`'s hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..adapter.factors import ModuleFactors
from ..formats.factors import FactorLayout
from ..formats.sizes import ModuleShape
from ..loop.resume import Keeping
from ..plan import Plan
from ..plan.layered import LayeredModel
from ..plan.survey import Bar
from ..plan.sweep import Question, Swept
from ..plan.types import TypePlan
from ..refine import Outcome, RefineJob

Windows = Sequence[Mapping[str, Any]]
Report = Callable[[int, int], None]
# Refines an adapter: the quantised model's file, the adapter's to begin with, the one to write, the job, the device.
FileRefiner = Callable[[Path, Path, Path, RefineJob, str | None], Outcome]


@dataclass(frozen=True)
class QuantizeJob:
    """A full-precision model to quantise, with an adapter or without.

    Attributes:
        model: a folder or a hub name.
        output: folder for the checkpoint.
        windows: calibration: `input_ids` and `attention_mask` of each window, lists of integers.
        settings: of the quantiser, by its own names.
        adapter: what `AdapterOptions.settle` takes; None for no adapter.
        plan: in place of ``adapter``: bits and ranks of every module.
        batch_size: windows per forward.
        trust_remote_code: whether model code from the hub may run.
        device: "cpu", "cuda" or "cuda:0"; None leaves it to the host.
        report: called with (layers done, layers in all).
        keeping: where finished layers are kept, so that an interrupted run is gone on with; None for nowhere.
    """

    model: str
    output: Path
    windows: Windows
    settings: Mapping[str, Any]
    adapter: Mapping[str, Any] | None = None
    plan: Plan | None = None
    batch_size: int = 1
    trust_remote_code: bool = False
    device: str | None = None
    report: Report | None = None
    keeping: Keeping | None = None


@dataclass(frozen=True)
class PruneJob:
    """A full-precision model to prune, with an adapter or without.

    Attributes:
        model: a folder or a hub name.
        output: folder for the pruned model.
        windows: calibration, as in `QuantizeJob`.
        method: one of `solve.METHODS`.
        pattern: of the zeros, in a form of `formats.sparsity.FORM`.
        bits: quantise the weights that are kept as well, to a checkpoint in GPTQ's format; None to leave them as they
            are.
        group_size: weights per scale, with ``bits``; -1 for whole rows.
        adapter: what `AdapterOptions.settle` takes; None for no adapter.
        dynamic: GPTQModel's overrides, module by module: `-:pattern` leaves modules as they are, and an `adapter` with
            a `rank` names theirs.
        batch_size: windows per forward.
        trust_remote_code: whether model code from the hub may run.
        report: called with (layers done, layers in all).
    """

    model: str
    output: Path
    windows: Windows
    method: str
    pattern: str
    bits: int | None = None
    group_size: int = 64
    adapter: Mapping[str, Any] | None = None
    dynamic: Mapping[str, Any] | None = None
    batch_size: int = 1
    trust_remote_code: bool = False
    report: Report | None = None


@dataclass(frozen=True)
class AdapterJob:
    """An adapter to make for a finished checkpoint.

    Attributes:
        base: the full-precision model, a folder or a hub name.
        checkpoint: the quantised model's folder or file.
        windows: calibration, as in `QuantizeJob`.
        adapter: what `AdapterOptions.settle` takes.
        output: folder or file for the adapter; None for the checkpoint's own.
        ranks: in place of the rank in ``adapter``, for a file whose plan names them: full module name → rank.
        over: folder of an adapter that stays on the checkpoint. The new one corrects what that leaves, with the inputs
            that modules have under both.
        without_layers: layers at the beginning of the model that get no factors.
        batch_size: windows per forward.
        loading: passed to the host's loader, for both models.
        report: called with (layers done, layers in all).
        keeping: where finished layers are kept, as in `QuantizeJob`.
    """

    base: str
    checkpoint: Path
    windows: Windows
    adapter: Mapping[str, Any]
    output: Path | None = None
    ranks: Mapping[str, int] | None = None
    over: Path | None = None
    without_layers: int = 0
    batch_size: int = 1
    loading: Mapping[str, Any] = field(default_factory=dict)
    report: Report | None = None
    keeping: Keeping | None = None

    def require_whole(self, named: str) -> None:
        """Refuse a member of an ensemble, for a host whose runtime has no weights for it.

        Args:
            named: what the host makes adapters for.

        Raises:
            NotImplementedError: naming it.
        """
        if self.over is not None or self.without_layers:
            raise NotImplementedError(
                f"EoRA: members of an ensemble are for checkpoints that GPTQModel loads; `{self.checkpoint}` is "
                f"{named}, whose runtime has one adapter at a time. Make one adapter for it: eora generate."
            )


# W of a module, by its full name: out × in, on the CPU.
ReadWeight = Callable[[str], torch.Tensor]
# Full module name → what gives Ŵ (out × in, float32) for W; modules that are not quantised are left out.
KnownWeights = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True)
class LoopJob:
    """A full-precision model to run layer by layer, with quantised weights that another host knows.

    Attributes:
        base: the full-precision model, a folder or a hub name.
        known: asked once, before the first layer, for the quantised weights of the modules in the loop's order. It
            raises where they do not fit.
        windows: calibration, as in `QuantizeJob`.
        adapter: what `AdapterOptions.settle` takes.
        layout: of the file that the factors are for.
        ranks: in place of a rank or a budget: full module name → rank, 0 for none.
        method: how the weights were quantised, for the record.
        together: module's name → what it shares a rank in with others of its shape, in the file that the factors are
            for; None for one that does not. Asked once ``known`` was.
        batch_size: windows per forward.
        loading: passed to the loop's loader.
        report: called with (layers done, layers in all).
        keeping: where finished layers are kept, as in `QuantizeJob`.
        source: tells one set of known weights from another, where layers are kept.
    """

    base: str
    known: Callable[[Sequence[ModuleShape], ReadWeight], KnownWeights]
    windows: Windows
    adapter: Mapping[str, Any]
    layout: FactorLayout
    method: str
    ranks: Mapping[str, int] | None = None
    together: Callable[[str], str | None] = lambda name: None
    batch_size: int = 1
    loading: Mapping[str, Any] = field(default_factory=dict)
    report: Report | None = None
    keeping: Keeping | None = None
    source: str = ""


@dataclass(frozen=True)
class Compensated:
    """What a loop has made.

    Attributes:
        factors: full module name → factors, on the CPU.
        details: what `eora.json` says beside the per-module report.
    """

    factors: Mapping[str, ModuleFactors]
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint ready to run.

    Attributes:
        model: a transformers causal language model.
        with_adapter: a context in which it computes with the adapter of a folder, or with none (None). What it was
            loaded with is back afterwards. Needs a model that was loaded with an adapter, or for adapters.
    """

    model: Any
    with_adapter: Callable[[Path | None], AbstractContextManager[None]]


class Planned(Protocol):
    """A full-precision model that plans are made for.

    Attributes:
        shapes: the modules that would be quantised, in the order in which the host meets them.
    """

    shapes: list[ModuleShape]

    def survey(self, windows: Windows, question: Question, kind: str, bar: Bar) -> Swept:
        """Forecast the modules.

        Args:
            windows: calibration, as in `QuantizeJob`.
            question: what to forecast.
            kind: of sensitivity.
            bar: makes a progress bar of a title.

        Raises:
            NotImplementedError: for a model that cannot be run layer by layer.
        """
        ...


class FullPrecision(Planned, Protocol):
    """A full-precision model that may also be run layer by layer."""

    def layered(self) -> LayeredModel:
        """The model, its weights read from files as they are needed where the host can do so.

        Raises:
            NotImplementedError: for a model that cannot be run layer by layer.
        """
        ...


@dataclass(frozen=True)
class ImatrixJob:
    """An importance matrix to measure for a quantiser.

    Attributes:
        base: the full-precision model, a folder or a hub name.
        model: its file in the quantiser's format, which names the tensors.
        windows: calibration, as in `QuantizeJob`.
        output: the file to write.
        source: what the calibration is called, for the record.
        trust_remote_code: whether model code from the hub may run.
        bar: makes a progress bar of a title.
    """

    base: str
    model: Path
    windows: Windows
    output: Path
    source: str
    trust_remote_code: bool = False
    bar: Bar = lambda title: iter


@dataclass(frozen=True)
class TypePlanJob:
    """Types of a quantiser's own and ranks to choose under one size.

    Attributes:
        base: the full-precision model, a folder or a hub name.
        files: the model quantised to each type that is on offer.
        total: bytes of weights and factors, in a form of `adapter.budget.FORM`.
        factor_bits: of the factors.
        sensitivity: what an error is taken to cost.
        windows: calibration, as in `QuantizeJob`.
        trust_remote_code: whether model code from the hub may run.
        bar: makes a progress bar of a title.
    """

    base: str
    files: Sequence[Path]
    total: str
    factor_bits: int
    sensitivity: str
    windows: Windows
    trust_remote_code: bool = False
    bar: Bar = lambda title: iter


@dataclass(frozen=True)
class TypePlanned:
    """A plan, and what it is compared with.

    Attributes:
        plan: types and ranks.
        weights: how many weights share the total.
        plain: file's name → its bytes and predicted loss.
        write: writes the plan and what else the quantiser takes, and returns lines that say how to go on.
    """

    plan: TypePlan
    weights: int
    plain: Mapping[str, tuple[int, float]]
    write: Callable[[Path], list[str]]


@dataclass(frozen=True)
class ExportJob:
    """A checkpoint or an adapter of ours to write in another host's format.

    Attributes:
        source: a checkpoint's folder, or an adapter's.
        like: a file of that model in the host's format.
        output: the file to write.
        base: the folder of the model that ``like`` holds, to compare with, where ``source`` is an adapter alone.
        report: called with (modules done, modules in all).
    """

    source: Path
    like: Path
    output: Path
    base: Path | None = None
    report: Report | None = None


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        model: the model's file; None where only an adapter was written.
        adapter: the adapter's file; None for a checkpoint without.
        inexact: full module name → relative difference from the checkpoint's weights; exact modules are left out.
        modules: how many modules were written.
    """

    model: Path | None
    adapter: Path | None
    inexact: Mapping[str, float]
    modules: int


class Loader(Protocol):
    """Loads a checkpoint."""

    def __call__(
        self,
        checkpoint: Path,
        adapter: Path | None = None,
        *,
        for_adapters: bool = False,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> Loaded:
        """Load a checkpoint with an adapter.

        Args:
            checkpoint: its folder.
            adapter: the adapter's folder; None for the one that the checkpoint names, if any.
            for_adapters: where no adapter is named, have kernels that take whichever `Loaded.with_adapter` puts on.
            device: "cpu", "cuda" or "cuda:0"; None leaves it to the host.
            trust_remote_code: whether model code that comes with the checkpoint may run.
        """
        ...
