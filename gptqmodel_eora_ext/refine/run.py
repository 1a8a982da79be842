"""A refinement from beginning to end: an adapter and a quantised model in, a better adapter out."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..adapter.errors import AdapterError, read_json
from ..adapter.factors import ModuleFactors
from ..adapter.folder import AdapterFolder
from ..adapter.naming import name_adapter
from ..adapter.save import save_adapter
from ..adapter.settings import MODULES, MODULES_BEFORE
from ..calibration.token_ids import require_token_ids
from ..formats.factors import PACKED_BITS, PACKED_LAYOUT, FactorLayout, QuantizedFactor, to_dense
from ..solve import balance, multiplies_bfloat16
from ..system.distributed import by_first, current, refuse_shared
from ..system.files import unfinished_folder, write_json
from ..system.interrupt import asked_to_stop
from ..system.kept import ResumeError, differences
from .evaluation import Evaluation
from .factors import TrainedFactors
from .natural import NaturalStep
from .outcome import RESUMABLE, Outcome
from .settings import NATURAL, RefineSettings
from .shared import dealt
from .student import Student, Trainee
from .teacher import Teacher, keep_teacher
from .training import Report, Training

log = logging.getLogger(__name__)

TEACHER, STATE, ASKED = "teacher.safetensors", "state.safetensors", "asked.json"

# A module's A (rank × in) and Bᵀ (rank × out) in the form that adapters have; A and B (out × rank) in GGUF.
Pair = tuple[torch.Tensor | QuantizedFactor, torch.Tensor | QuantizedFactor]


@dataclass(frozen=True)
class RefineJob:
    """What a refinement works with.

    Attributes:
        base: the full-precision model, a folder or a hub name.
        ids: windows × tokens.
        settings: what was asked.
        trust_remote_code: whether model code from the hub may run.
        teaching: hears how far the full-precision model is: (steps done, steps in all).
        training: hears of every step, with a note of its loss.
        restart: whether what an interrupted run has left is removed.
    """

    base: str
    ids: torch.Tensor
    settings: RefineSettings
    trust_remote_code: bool = False
    teaching: Callable[[int, int], None] = lambda done, total: None
    training: Report = lambda done, total, note: None
    restart: bool = False


def refine_adapter(trainee: Trainee, checkpoint: Path, source: AdapterFolder, output: Path, job: RefineJob) -> Outcome:
    """Train an adapter's factors by what the whole model loses, and write them as an adapter of its own.

    Ctrl-C ends the training after the step under way, and what is best so far is written. The same call goes on from
    there: until a run is complete, its state and what the full-precision model computes are kept in a hidden folder
    beside ``output``.

    Args:
        trainee: the quantised model in memory, without an adapter.
        checkpoint: its folder. Where ``output`` lies inside, the checkpoint names it from then on.
        source: the adapter to begin with; it stays as it is.
        output: folder for the refined one.
        job: base, calibration and settings.

    Returns:
        The run's outcome; `after` is never above `before`.

    Raises:
        AdapterError: when the adapter does not fit the checkpoint.
        ValueError: for a base or calibration that does not fit the checkpoint, or for ``output`` equal to ``source``.
        ResumeError: where an interrupted run with other settings, data or factors has left its state.
        NotImplementedError: for a model that cannot be run layer by layer.

    Example:
        >>> refine_adapter(trainee, Path("out"), AdapterFolder.open("out/eora"), Path("out/eora-refined"), job)
    """
    if output.resolve() == source.path.resolve():
        raise ValueError(f"EoRA: `{output}` is the adapter to begin with, which stays as it is. Name another folder.")
    start, bits, stored_as = read_start(source, trainee)
    work = unfinished_folder(output)
    begin(work, source.weights, job)
    outcome, factors = refine_factors(trainee, start, bits, stored_as, job, work)
    known = source.details or {}
    details = {**known, MODULES_BEFORE: known.get(MODULES) or known.get(MODULES_BEFORE, {}),
               "refinement": describe(outcome, job), "factor_bits": bits}  # fmt: skip
    names = [name for name, _ in trainee.model.named_modules()]
    written = {name: ModuleFactors.of_unknown_error(*pair) for name, pair in factors.items()}

    def write() -> None:
        save_adapter(output, written, base_model=str(checkpoint), module_names=names, details=details)
        name_adapter(checkpoint, output, written)
        if outcome.ended not in RESUMABLE:
            shutil.rmtree(work, ignore_errors=True)

    by_first(write)
    return outcome


def refine_factors(
    trainee: Trainee,
    start: Mapping[str, Pair],
    bits: int,
    stored_as: torch.dtype,
    job: RefineJob,
    work: Path,
    layout: FactorLayout = PACKED_LAYOUT,
) -> tuple[Outcome, dict[str, Pair]]:
    """As `refine_adapter`, from factors in memory to factors in memory.

    Args:
        trainee: the quantised model, whose modules are replaced meanwhile.
        start: module → A and Bᵀ, as they are stored; A and B where groups run along the rank.
        bits: of a stored value: 16, 8 or 4.
        stored_as: dtype of factors in 16 bits.
        job: base, calibration and settings.
        work: folder for what is kept between runs, after `begin`; what lies there is gone on from.
        layout: of the file that the factors are for.
    """
    device = next(trainee.model.parameters()).device
    dtype = activation_dtype(device)
    dense = {name: (to_dense(a, torch.float32), to_dense(b, torch.float32)) for name, (a, b) in start.items()}
    if bits not in PACKED_BITS:
        # A step moves the values of A and of B by about as much, so they should be of one size. Packed factors are, and
        # lie on a grid that scaling would leave.
        dense = {name: _balanced(*pair) for name, pair in dense.items()}
    require_token_ids(job.ids, int(trainee.model.get_input_embeddings().weight.shape[0]))
    taught = _teacher_file(work)
    if not taught.is_file():
        work.mkdir(parents=True, exist_ok=True)
        ids = job.ids[dealt(len(job.ids), job.settings.seed).taught]
        keep_teacher(job.base, list(trainee.weights), ids, taught, dtype, device=device,
                     trust_remote_code=job.trust_remote_code, report=job.teaching)  # fmt: skip
    factors = TrainedFactors(dense, bits=bits, stored_as=stored_as, dtype=dtype, layout=layout, device=device)
    del dense
    teacher = Teacher(taught)
    student = Student(trainee, factors, dtype)
    try:
        with student.head() as head:
            teacher.check_head(head, job.base)
        with asked_to_stop() as stopping:
            settings = job.settings
            if settings.loss == NATURAL:
                refuse_shared(f"the loss {NATURAL!r}", "Start it without torchrun, or train by another loss")
                evaluation = Evaluation(student, teacher, job.ids, "kl", settings.seed)
                outcome = NaturalStep(student, evaluation, seed=settings.seed, folder=work, interrupted=stopping,
                                      report=job.training).run()  # fmt: skip
            else:
                outcome = Training(student, teacher, job.ids, settings, state=work / STATE, interrupted=stopping,
                                   report=job.training).run()  # fmt: skip
    finally:
        student.close()
    log.info("EoRA: refinement ended (%s) after %d of %d steps; validation loss %.4f, %.4f at the start.",
             outcome.ended, outcome.steps, outcome.planned, outcome.after, outcome.before)  # fmt: skip
    if outcome.best is None:
        return outcome, dict(start)
    return outcome, {name: factors.read(outcome.best, name) for name in factors.modules()}


def _teacher_file(work: Path) -> Path:
    """Where this process keeps what the full-precision model computes; each of several has its own windows there."""
    group = current()
    return work / (TEACHER if group is None else f"{group.rank}-{TEACHER}")


def activation_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32, else float32."""
    return torch.bfloat16 if device.type != "cpu" or multiplies_bfloat16(device) else torch.float32


def read_start(source: AdapterFolder, trainee: Trainee) -> tuple[dict[str, Pair], int, torch.dtype]:
    """The factors of an adapter by the model's names of modules, their bits, and the dtype of those in 16 bits.

    Raises:
        AdapterError: when they do not fit the model.
    """
    names = {stored: name for name, stored in source.match(trainee.weights).items()}
    start: dict[str, Pair] = {}
    stored_as = torch.float16
    for stored, read in source.factors(list(names)):
        weight = trainee.weights[names[stored]]
        found, expected = (len(read.lora_B), read.lora_A.shape[1]), (weight.out_features, weight.in_features)
        if found != expected:
            raise AdapterError(
                f"Adapter: {stored} in `{source.path}` is for a weight of out × in = {found[0]} × {found[1]}, but the "
                f"checkpoint's is {expected[0]} × {expected[1]}. Use the adapter that was made for the checkpoint."
            )
        start[names[stored]] = read.packed or (read.lora_A, read.lora_B.T)
        stored_as = read.lora_A.dtype
    return start, source.factor_bits, stored_as


def describe(outcome: Outcome, job: RefineJob) -> dict[str, Any]:
    """What `eora.json` tells of a refinement."""
    settings = {**asdict(job.settings), "tokens": job.ids.numel()}
    return {**settings, **_windows_a_step(), "sha256": _fingerprint(job.ids), **outcome.described(),
            "version": __version__}  # fmt: skip


def _windows_a_step() -> dict[str, int]:
    """How many windows a step takes, told where it is more than one: one in each of several processes."""
    group = current()
    return {} if group is None else {"windows_a_step": group.size}


def _balanced(down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lora_A, lora_B = balance(down, up.T)
    return lora_A, lora_B.T


def _fingerprint(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()


def begin(work: Path, adapter: Path, job: RefineJob, **more: str) -> None:
    """Have the folder hold what an interrupted run of the same has left, or nothing.

    Args:
        work: the folder.
        adapter: file of the factors to begin with.
        job: base, calibration and settings.
        more: what else tells one run from another.

    Raises:
        ResumeError: where a run that was asked something else has left its state.
        ValueError: where processes were given different things to refine.
    """
    asked = {"base": job.base, **asdict(job.settings), "version": __version__, "adapter": _digest(adapter),
             "ids": _fingerprint(job.ids), **more, **_windows_a_step()}  # fmt: skip
    if (group := current()) is not None:
        group.at("refining")
        group.agree({"the adapter to begin with": asked["adapter"][:16], "calibration data": asked["ids"][:16],
                     "base": job.base, "settings": asdict(job.settings), "version": __version__, **more})  # fmt: skip
    by_first(lambda: _prepare(work, asked, job.restart))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prepare(work: Path, asked: dict[str, Any], restart: bool) -> None:
    if (work / ASKED).is_file() and not restart:
        unlike = differences(read_json(work / ASKED), json.loads(json.dumps(asked)))
        if not unlike:
            log.info("EoRA: an interrupted refinement in `%s` is gone on with.", work)
            return
        raise ResumeError(
            f"EoRA: `{work}` was left by an interrupted refinement that was asked something else "
            f"({'; '.join(unlike)}). Ask the same again, and it goes on. Begin anew: `--restart`, or remove the folder."
        )
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(work / ASKED, asked)
