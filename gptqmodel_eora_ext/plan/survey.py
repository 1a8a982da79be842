"""What is measured of a model before it is quantised: sensitivities, which are kept in a cache, and forecasts."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..adapter.budget import parse_budget
from ..adapter.validate import validate_choice
from ..adapter.vocabulary import SENSITIVITIES
from ..system.distributed import current
from ..system.files import cache_folder, replaced_folder, unfinished_folder
from ..system.group import Group
from ..system.kept import InUse, Kept, kept_state
from ..system.spill import spilling
from .gradients import Progress, measure_gradients
from .kept_gradients import StepsKept
from .kept_sweep import kept_sweep
from .layered import LayeredModel
from .sensitivity import CONTENTS, Sensitivity, SensitivityWriter, fingerprint
from .sweep import Question, Swept, sweep

log = logging.getLogger(__name__)

# C is measured on this many tokens of the calibration data. More were not tried.
SENSITIVITY_TOKENS = 4096
# Gradients are taken of only the first so many of those tokens. A gradient costs three times a forward; and the
# quantiser and the factors fit themselves to C, not to gradients, so that C is what needs many tokens.
GRADIENT_TOKENS = 2048
# Kinds of modules are measured on this many tokens; not on those of C, where there are others.
KIND_TOKENS = 512
# Windows are run together up to this many tokens, and a longer one alone, since a layer's activations take memory.
PASS_TOKENS = 1024
# Sets how many bytes of layers' inputs stay in memory between the sweep forward and the one back; the rest is on disk.
MEMORY_VARIABLE = "EORA_SURVEY_MEMORY"
DEFAULT_MEMORY = "1GiB"
# The kind that needs no gradients.
RELATIVE = "relative"

Bar = Callable[[str], Progress]


def survey(
    model: LayeredModel,
    modules: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    question: Question,
    *,
    kind: str,
    with_kinds: bool,
    bar: Bar = lambda title: iter,
) -> Swept:
    """Measure sensitivities (or find them in the cache), and forecast every module.

    Args:
        model: run layer by layer, at full precision.
        modules: full names of linear layers.
        batches: calibration: `input_ids` and `attention_mask`, windows × tokens each.
        question: what to forecast.
        kind: of sensitivity, one of `SENSITIVITIES`.
        with_kinds: whether to measure what all modules of a kind (`q_proj`) lose together.
        bar: makes a progress bar of that title, which wraps a sequence.

    Raises:
        ValueError: for an unknown kind, NaN or infinity in inputs or gradients, or a limit of memory in no known form.
        NotImplementedError: for a model that cannot be run layer by layer.
    """
    validate_choice(kind, SENSITIVITIES, what="kind")
    # A host's loop may run in inference mode, in which no gradient can be taken.
    with torch.inference_mode(False):
        return _survey(model, modules, batches, question, kind=kind, with_kinds=with_kinds, bar=bar)


def _survey(
    model: LayeredModel,
    modules: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    question: Question,
    *,
    kind: str,
    with_kinds: bool,
    bar: Bar,
) -> Swept:
    sensitivity = None if kind == RELATIVE else cached_sensitivity(model, modules, batches, kind=kind, bar=bar)
    some = first_tokens(batches, SENSITIVITY_TOKENS)
    others = unseen_tokens(batches) if with_kinds else []
    log.info(
        "EoRA: forecasting %d modules on %d tokens, layer by layer%s.", len(modules), _count(some),
        f", and each kind of them on {_count(others)} others" if with_kinds else "",
    )  # fmt: skip
    with kept_sweep(model, modules, [*some, *others], kind, question) as keeper:
        known = keeper.found(sensitivity) if keeper is not None else None
        if known is not None:
            return known
        found = sweep(
            model,
            modules,
            some,
            sensitivity,
            question,
            kind_batches=others,
            progress=bar("EoRA: forecasting, layer by layer"),
            keeper=keeper,
        )
        if keeper is not None:
            keeper.finish(found, len(model))
        return found


def survey_some(
    model: LayeredModel,
    modules: Sequence[str],
    some: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    question: Question,
    *,
    kind: str,
    bar: Bar = lambda title: iter,
) -> Swept:
    """Forecast some modules alone, on the tokens and by the sensitivities of `survey`, which the cache has after it.

    Args:
        modules: full names of all linear layers, by which sensitivities are kept.
        some: those to forecast.
        model, batches, question, kind, bar: as for `survey`.
    """
    with torch.inference_mode(False):
        sensitivity = None if kind == RELATIVE else cached_sensitivity(model, modules, batches, kind=kind, bar=bar)
        progress = bar("EoRA: forecasting some modules")
        return sweep(model, some, first_tokens(batches, SENSITIVITY_TOKENS), sensitivity, question, progress=progress)


def cached_sensitivity(
    model: LayeredModel,
    modules: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    *,
    kind: str,
    bar: Bar = lambda title: iter,
) -> Sensitivity:
    """Sensitivities by gradients from the user's cache; measured and put there where it has none for this case.

    Args:
        model: run layer by layer, at full precision.
        modules: full names of linear layers.
        batches: calibration: `input_ids` and `attention_mask`, windows × tokens each.
        kind: "fisher" or "empirical".
        bar: makes a progress bar of that title, which wraps a sequence.

    Raises:
        ValueError: for NaN or infinity in gradients, or a limit of memory in no known form.
        NotImplementedError: for a model that cannot be run layer by layer.
    """
    some = first_tokens(batches, GRADIENT_TOKENS)
    limit = memory_limit()
    named = fingerprint(model, modules, some, kind)
    folder = cache_folder() / "sensitivity" / named
    group = current()
    if group is not None:
        group.agree({"the model and data of the survey": named})
        group.at("measuring sensitivities")
    # Hosts may have caches of their own, so that some of several processes may find it and others not.
    found = (folder / CONTENTS).is_file()
    if found if group is None else all(group.gather(found)):
        log.info("EoRA: sensitivities from `%s`.", folder)
        return Sensitivity.load(folder)
    log.info("EoRA: measuring gradients (%s) of %d modules on %d tokens, layer by layer.", kind, len(modules),
             _count(some))  # fmt: skip

    def measure(fresh: Path, kept: Kept | None) -> None:
        with spilling(limit, fresh) as spill:
            writer = SensitivityWriter(fresh, _count(some))
            measure_gradients(
                model, modules, some, writer.add, spill=spill, kind=kind, progress=bar("EoRA: measuring sensitivities"),
                keeper=None if kept is None else StepsKept(kept, writer),
            )  # fmt: skip
            if spill.on_disk:
                log.info("EoRA: %.1f MB of layer inputs were on disk (%s=%d).", spill.on_disk / 1e6, MEMORY_VARIABLE,
                         limit)  # fmt: skip
            writer.finish(kind, named)

    if group is not None:
        with _by_several(group, folder) as fresh:
            measure(fresh, None)
    else:
        with ExitStack() as stack:
            kept = None
            # Another process may be at it; then this one measures by itself.
            with contextlib.suppress(InUse):
                asked = {"version": __version__, "torch": torch.__version__}
                kept = stack.enter_context(kept_state(unfinished_folder(folder), asked, supersede=True))
            with replaced_folder(folder, unfinished=None if kept is None else kept.root / "made") as fresh:
                measure(fresh, kept)
            if kept is not None:
                kept.finish()
    size = sum(file.stat().st_size for file in folder.iterdir())
    log.info("EoRA: sensitivities kept in `%s`, %.1f MB.", folder, size / 1e6)
    return Sensitivity.load(folder)


@contextmanager
def _by_several(group: Group, folder: Path) -> Iterator[Path]:
    """Yield a new folder, which the first process on each host makes ``folder``. It is not gone on with after an
    interruption."""
    with ExitStack() as stack:
        first = group.local_rank == 0
        place: Any = replaced_folder(folder) if first else tempfile.TemporaryDirectory()
        yield Path(stack.enter_context(place))
        # One after another, since hosts may share a file system.
        group.in_turn(stack.close)


def memory_limit() -> int:
    """Bytes of layer inputs that may stay in memory, by `MEMORY_VARIABLE`.

    Raises:
        ValueError: for a value that is no number of bytes.
    """
    asked = os.environ.get(MEMORY_VARIABLE) or DEFAULT_MEMORY
    value, unit = parse_budget(int(asked) if asked.isdigit() and int(asked) else asked, what=MEMORY_VARIABLE)
    if unit != "b":
        raise ValueError(f"{MEMORY_VARIABLE} must be a number of bytes, for instance {DEFAULT_MEMORY}, got {asked!r}.")
    return int(value)


def _count(batches: Sequence[Mapping[str, Any]]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def unseen_tokens(batches: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """`KIND_TOKENS` tokens that C was not measured on. Little data has no others; then they are its last tokens.

    Of a window longer than that, its first tokens are taken.
    """
    taken = first_tokens(batches, SENSITIVITY_TOKENS + KIND_TOKENS)
    found: list[Mapping[str, Any]] = []
    left = KIND_TOKENS
    for batch in reversed(taken):
        if left <= 0:
            break
        rows, width = batch["input_ids"].shape
        few = min(rows, -(-left // width))
        found.append({name: one[rows - few :, :KIND_TOKENS] for name, one in batch.items()})
        left -= few * width
    return found[::-1]


def first_tokens(batches: Sequence[Mapping[str, Any]], tokens: int) -> list[Mapping[str, Any]]:
    """The first windows that together have at least ``tokens`` tokens, put together into passes of `PASS_TOKENS`.

    Returns:
        For each pass `input_ids` and `attention_mask`, windows × tokens.
    """
    taken: list[Mapping[str, Any]] = []
    for batch in batches:
        ids = torch.atleast_2d(torch.as_tensor(batch["input_ids"]))
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask).reshape(ids.shape)
        rows = max(1, PASS_TOKENS // ids.shape[1])
        for few_ids, few_mask in zip(ids.split(rows), mask.split(rows), strict=True):
            if tokens <= 0:
                return taken
            taken.append({"input_ids": few_ids, "attention_mask": few_mask})
            tokens -= few_ids.numel()
    return taken
