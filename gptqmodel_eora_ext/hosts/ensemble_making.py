"""Making an ensemble: the shared adapter, a member for each domain on the error that it leaves, and the router."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapter.budget import budget_bytes
from ..adapter.ensemble.division import Division, Sample, divide
from ..adapter.ensemble.folder import (
    MEMBERS_FOLDER,
    ROUTER_FILE,
    SHARED,
    EnsembleFolder,
    Member,
    check_name,
    checkpoint_fingerprint,
    fingerprint,
    whole_tokens,
    write_manifest,
)
from ..adapter.ensemble.pooling import summed
from ..adapter.ensemble.router import LEAST_WINDOWS, LENGTHS, Router
from ..adapter.errors import AdapterError
from ..adapter.folder import AdapterFolder
from ..adapter.layers import layer_number, layers_of
from ..adapter.options import AdapterOptions
from ..capture import SecondMoment
from ..formats.sizes import ModuleShape
from ..system.files import replaced_file, replaced_folder
from .ensemble import early_inputs, readers
from .jobs import AdapterJob, Loaded, Report, Windows
from .registry import adapter_maker, loader
from .transformers.generate import local_folder

# Layers that no member adapts, for the router to look at what they compute.
DEPTH = 2
# Tokens of a domain at least: fewer do not fill the windows by which the router knows it.
LEAST_TOKENS = LEAST_WINDOWS * LENGTHS[0]
# How the budget divides is forecast on every so many-th layer, and on so many windows of each text.
SAMPLED_EVERY, SAMPLED_WINDOWS = 6, 8
# Windows that go through the model at a time where only the first layers are computed.
BATCH = 8


@dataclass(frozen=True)
class EnsembleJob:
    """An ensemble to make for a finished checkpoint.

    Attributes:
        base: the full-precision model, a folder or a hub name.
        checkpoint: the quantised model's folder.
        output: the ensemble's folder; inside the checkpoint, the checkpoint names it.
        shared: windows of general text. The shared adapter is made of it and of the domains' text, in equal parts.
        domains: name → windows of the domain's text.
        budget: of all factors together, in a form of `adapter.budget.FORM`.
        samples: windows of each text that factors are calibrated on; the router is made of all.
        shared_part: share of the budget for the shared adapter, 0 to 1; None lets forecasts choose.
        depth: layers at the beginning that no member adapts.
        background: whether the shared text is a class to the router, so that a prompt like it falls back. Where it is a
            domain's text as well, it should not be.
        controls: folder for what an ensemble is compared with: one adapter for the mixed text in the bytes of all
            members together (`total`), and one in those that serve a prompt (`active`); None for none.
        adapter: what `AdapterOptions.settle` takes beside a budget.
        batch_size: windows per forward.
        loading: passed to the host's loader.
        report: makes a `Report` of a title.
    """

    base: str
    checkpoint: Path
    output: Path
    shared: Windows
    domains: Mapping[str, Windows]
    budget: int | str
    samples: int
    shared_part: float | None = None
    depth: int = DEPTH
    background: bool = True
    controls: Path | None = None
    adapter: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    loading: Mapping[str, Any] = field(default_factory=dict)
    report: Callable[[str], Report | None] = lambda title: None


def make_ensemble(job: EnsembleJob) -> Path:
    """Make an ensemble and return its folder.

    The shared adapter is made first. Interrupted after that, the folder is a plain adapter, which the ensemble of
    another run takes the place of.

    Raises:
        AdapterError: for names that overlap or cannot be folders, texts too short, or a checkpoint without weights.
        ValueError: for a budget that cannot be, and as hosts do.
        NotImplementedError: for a checkpoint that GPTQModel does not load.
    """
    _check(job.domains, job.shared)
    if job.shared_part is not None and not 0 < job.shared_part < 1:
        raise ValueError(f"Ensemble: the shared adapter's part of the budget is {job.shared_part}; expected between 0 "
                         f"and 1.")  # fmt: skip
    made_for = checkpoint_fingerprint(job.checkpoint)
    division = _division(job)
    texts = _texts(job)
    # It serves every prompt, and its corrections for one kind of text harm no other.
    shared = _adapter(job, mixed(list(texts.values()), job.samples), division.shared, job.output, SHARED)
    over = fingerprint([AdapterFolder.open(shared).weights])
    members = []
    for name, windows in job.domains.items():
        _member(job, name, windows[: job.samples], division.members[name])
        members.append(Member(name, over, made_for, _tokens(windows[: job.samples])))
    with _opened(job, job.output) as (loaded, layers):
        reads = readers(loaded.model, {shape.name for shape in _shapes(loaded)}, job.depth)
        sums = {name: _sums(loaded, reads, layers[job.depth], windows) for name, windows in texts.items()}
    router = Router.fit(sums, list(job.domains), reads)
    with replaced_file(job.output / ROUTER_FILE) as fresh:
        router.save(fresh)
    write_manifest(job.output, members, job.depth, router.settings)
    if job.controls is not None:
        _controls(job, division)
    return job.output


def add_member(job: EnsembleJob, *, replace: bool = False) -> Path:
    """Add domains to an ensemble that exists, or make some anew; the other members stay as they are, byte for byte.

    The router learns the new domains in the directions that it has, so that nothing of the others changes there,
    either.

    Args:
        job: its `output` is the ensemble, `domains` are the new ones, `budget` is for each of them, and `shared` is not
            read.
        replace: whether a domain may be there already.

    Raises:
        AdapterError: for a folder that is no ensemble, one of another checkpoint, and names that are taken.
    """
    ensemble = EnsembleFolder.open(job.output)
    ensemble.check_checkpoint(job.checkpoint)
    kept = [one for one in ensemble.members if not (replace and one.name in job.domains)]
    _check(job.domains, None, known=[one.name for one in kept])
    over, made_for = fingerprint([ensemble.shared.weights]), checkpoint_fingerprint(job.checkpoint)
    router = Router.load(job.output / ROUTER_FILE, ensemble.names[1:], ensemble.settings)
    with _opened(job, job.output) as (loaded, layers):
        budget = budget_bytes(job.budget, _shapes(loaded))
        layer = layers[ensemble.depth]
        sums = {name: _sums(loaded, router.reads, layer, windows) for name, windows in job.domains.items()}
    # First what takes a moment: text that the router cannot learn from is told before the members are made.
    for name in job.domains:
        router = router.with_class(name, sums[name])
    for name, windows in job.domains.items():
        _member(job, name, windows[: job.samples], budget)
    new = [Member(name, over, made_for, _tokens(windows[: job.samples])) for name, windows in job.domains.items()]
    by_name = {one.name: one for one in (*kept, *new)}
    members = [by_name[name] for name in router.members]
    with replaced_file(job.output / ROUTER_FILE) as fresh:
        router.save(fresh)
    write_manifest(job.output, members, ensemble.depth, router.settings)
    return job.output


def _check(domains: Mapping[str, Windows], shared: Windows | None, known: Sequence[str] = ()) -> None:
    if not domains:
        raise AdapterError("Ensemble: no domain is named. Give at least one: --domain name=file.")
    taken = list(known)
    for name, windows in domains.items():
        check_name(name, taken)
        taken.append(name)
        whole_tokens(_tokens(windows), f"the text of domain {name}", LEAST_TOKENS)
    if shared is not None:
        whole_tokens(_tokens(shared), "the shared text", LEAST_TOKENS)


def _tokens(windows: Windows) -> int:
    return sum(len(one["input_ids"]) for one in windows)


def _adapter(
    job: EnsembleJob, windows: Windows, budget: int, output: Path, title: str, over: Path | None = None
) -> Path:
    return adapter_maker(job.checkpoint)(
        AdapterJob(
            base=job.base,
            checkpoint=job.checkpoint,
            windows=windows,
            adapter={**job.adapter, "budget": budget},
            output=output,
            over=over,
            without_layers=0 if over is None else job.depth,
            batch_size=job.batch_size,
            loading=job.loading,
            report=job.report(f"adapter {title}"),
        )
    )


def _member(job: EnsembleJob, name: str, windows: Windows, budget: int) -> None:
    """Make a member and put it into the ensemble's folder in one step."""
    with tempfile.TemporaryDirectory() as scratch:
        made = _adapter(job, windows, budget, Path(scratch) / name, name, over=job.output)
        place = job.output / MEMBERS_FOLDER / name
        place.parent.mkdir(exist_ok=True)
        with replaced_folder(place) as fresh:
            for file in made.iterdir():
                shutil.copy2(file, fresh / file.name)


def _texts(job: EnsembleJob) -> dict[str, Windows]:
    """All texts that are told apart: the shared one, unless it is a domain's, too, and each domain's."""
    return {**({SHARED: job.shared} if job.background else {}), **job.domains}


def mixed(texts: Sequence[Windows], samples: int) -> list[Mapping[str, Any]]:
    """Windows of several texts in turns, so many of each."""
    return [text[index] for index in range(samples) for text in texts if index < len(text)]


def _controls(job: EnsembleJob, division: Division) -> None:
    assert job.controls is not None
    windows = mixed(list(_texts(job).values()), job.samples)
    active = division.shared + max(division.members.values())
    for name, budget in (("total", division.total), ("active", active)):
        _adapter(job, windows, budget, job.controls / name, f"of mixed text, {name} bytes")


@contextlib.contextmanager
def _opened(job: EnsembleJob, adapter: Path | None) -> Iterator[tuple[Loaded, list[torch.nn.Module]]]:
    """The checkpoint with an adapter, or without any, and its layers; let go of after the block."""
    trust = bool(job.loading.get("trust_remote_code"))
    loaded = loader(job.checkpoint)(job.checkpoint, adapter, for_adapters=adapter is None, trust_remote_code=trust)
    yield loaded, layers_of(loaded.model, [shape.name for shape in _shapes(loaded)])


def _shapes(loaded: Loaded) -> list[ModuleShape]:
    """The quantised linear modules of a loaded checkpoint: what has the two widths and is no plain linear."""
    return [
        ModuleShape(name, int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        for name, module in loaded.model.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
        and not isinstance(module, torch.nn.Linear) and layer_number(name) is not None
    ]  # fmt: skip


def _sums(loaded: Loaded, reads: Sequence[str], layer: torch.nn.Module, windows: Windows) -> torch.Tensor:
    """What the router learns from: windows × pieces × features, float32."""
    found = []
    for begin in range(0, len(windows), BATCH):
        ids = torch.tensor([one["input_ids"] for one in windows[begin : begin + BATCH]], device=loaded.model.device)
        found.append(summed(early_inputs(loaded.model, reads, layer, ids)).to("cpu"))
    return torch.cat(found)


def _division(job: EnsembleJob) -> Division:
    """How the budget divides: as asked, or as forecast on a sample of layers."""
    with _opened(job, None) as (loaded, layers):
        if job.depth >= len(layers):
            raise AdapterError(f"Ensemble: the router looks behind layer {job.depth}, and the model has {len(layers)}. "
                               f"Choose a smaller --depth.")  # fmt: skip
        shapes = _shapes(loaded)
        total = budget_bytes(job.budget, shapes)
        if job.shared_part is not None:
            return Division.by_part(total, job.shared_part, list(job.domains))
        adapted = [shape for shape in shapes if (layer_number(shape.name) or 0) >= job.depth]
        samples = _samples(job, loaded, shapes, _texts(job))
        return divide(
            samples, total, sum(shape.weights for shape in shapes), list(job.domains),
            factor_bits=AdapterOptions.settle(**job.adapter, budget=job.budget).factor_bits,
            member_weights=sum(shape.weights for shape in adapted),
        )  # fmt: skip


def _samples(
    job: EnsembleJob, loaded: Loaded, shapes: Sequence[ModuleShape], texts: Mapping[str, Windows]
) -> Iterator[Sample]:
    """ΔW of modules of some layers, and the second moment of their inputs by each text."""
    folder = local_folder(job.base)
    names = [shape.name for shape in shapes
             if ((layer_number(shape.name) or 0) - job.depth) % SAMPLED_EVERY == 0
             and (layer_number(shape.name) or 0) >= job.depth]  # fmt: skip
    moments = {text: {name: SecondMoment(_width(loaded, name), name) for name in names} for text in texts}
    for text, windows in texts.items():
        hooks = [
            loaded.model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, moment=moments[text][name]: moment.add(args[0])
            )
            for name in names
        ]
        try:
            with torch.inference_mode():
                for window in windows[:SAMPLED_WINDOWS]:
                    loaded.model(input_ids=torch.tensor([window["input_ids"]], device=loaded.model.device))
        finally:
            for hook in hooks:
                hook.remove()
    for name in names:
        weight = None if folder is None else _stored_weight(folder, f"{name}.weight")
        if weight is None:
            continue
        module = loaded.model.get_submodule(name)
        with torch.inference_mode():
            eye = torch.eye(_width(loaded, name), dtype=loaded.model.dtype, device=loaded.model.device)
            quantized = (module(eye) - module(torch.zeros_like(eye[:1]))).T.float().cpu()
        if quantized.shape == weight.shape:
            yield Sample(weight.float() - quantized, {text: found[name].mean() for text, found in moments.items()})


def _width(loaded: Loaded, name: str) -> int:
    return int(loaded.model.get_submodule(name).in_features)  # type: ignore[arg-type]


def _stored_weight(folder: Path, key: str) -> torch.Tensor | None:
    """A weight of a full-precision model's files; None for one that has another name there."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if key in file.keys():  # noqa: SIM118
                return file.get_tensor(key)
    return None
