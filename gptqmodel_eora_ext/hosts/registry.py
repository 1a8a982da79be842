"""Which host serves what is asked: commands and the evaluation come here, and name no host.

Every host's folder has a `serves.py` with some of the functions below (`quantizer`, `adapter_maker`, `loader`,
`planner`, `trainee`). Each of them returns what serves the case, or None where the host does not serve it. Hosts are
asked in the order of `HOSTS`, and a host's library is imported only when the host is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ..formats.sizes import ModuleShape
from ..plan import Plan
from ..plan.survey import Bar
from ..plan.sweep import Question, Swept
from ..refine import Trainee

# The hosts' folders, in the order in which they are asked.
HOSTS = ("gptqmodel", "autoround")

Windows = Sequence[Mapping[str, Any]]
Report = Callable[[int, int], None]


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


@dataclass(frozen=True)
class AdapterJob:
    """An adapter to make for a finished checkpoint.

    Attributes:
        base: the full-precision model, a folder or a hub name.
        checkpoint: the quantised model's folder.
        windows: calibration, as in `QuantizeJob`.
        adapter: what `AdapterOptions.settle` takes.
        output: folder for the adapter; None for the checkpoint's own.
        batch_size: windows per forward.
        loading: passed to the host's loader, for both models.
        report: called with (layers done, layers in all).
    """

    base: str
    checkpoint: Path
    windows: Windows
    adapter: Mapping[str, Any]
    output: Path | None = None
    batch_size: int = 1
    loading: Mapping[str, Any] = field(default_factory=dict)
    report: Report | None = None


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


def quantizer(name: str) -> Callable[[QuantizeJob], Path]:
    """What quantises by ``name`` ("gptq", "autoround"); it returns the checkpoint's folder.

    Raises:
        ValueError: for a name that no host serves.

    Example:
        >>> job = QuantizeJob("Qwen/Qwen3-8B", Path("out"), windows, {"bits": 2, "group_size": 64}, {"rank": 64})
        >>> folder = quantizer("gptq")(job)
    """
    return _first("quantizer", name)


def adapter_maker(checkpoint: Path) -> Callable[[AdapterJob], Path]:
    """What makes adapters for a finished checkpoint; it returns the adapter's folder.

    Raises:
        ValueError: for a checkpoint that no host serves.
    """
    return _first("adapter_maker", checkpoint)


def loader(checkpoint: Path) -> Loader:
    """What loads a checkpoint.

    Raises:
        ValueError: for a checkpoint that no host serves.
    """
    return _first("loader", checkpoint)


def trainee(checkpoint: Path) -> Callable[..., Trainee]:
    """What opens a checkpoint to train an adapter for it, from its folder and, by keyword, `trust_remote_code` and
    `device`.

    Raises:
        ValueError: for a checkpoint that no host serves.
    """
    return _first("trainee", checkpoint)


def planner(name: str) -> Callable[[str, Mapping[str, Any], bool], Planned]:
    """What opens a model to plan for the quantiser ``name``, from the model, the quantiser's settings, and whether
    model code from the hub may run.

    Raises:
        ValueError: for a name that no host serves.
    """
    return _first("planner", name)


def _first(offer: str, asked: Any) -> Any:
    """What the first host that serves ``asked`` returns from the function ``offer`` of its `serves.py`."""
    for host in HOSTS:
        offered = getattr(import_module(f".{host}.serves", __package__), offer, None)
        if offered is not None and (found := offered(asked)) is not None:
            return found
    raise ValueError(f"No {offer.replace('_', ' ')} for `{asked}` among {', '.join(HOSTS)}.")
