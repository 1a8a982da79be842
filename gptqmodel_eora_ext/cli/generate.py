"""The command `eora generate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..adapter.naming import DEFAULT_FOLDER
from ..adapter.summary import summarize
from ..adapter.vocabulary import OBJECTIVES
from ..calibration import DEFAULT_SAMPLES, DEFAULT_SEQLEN, tokenized
from ..plan.types import TypePlan
from ..system.distributed import is_first
from .options import (
    BatchSize,
    Budget,
    Calibration,
    FactorBits,
    LogJson,
    Model,
    Objective,
    PresetName,
    Rank,
    RefineTokens,
    Restart,
    Resume,
    Samples,
    Sensitivity,
    SeqLen,
    TrustRemoteCode,
    adapter_options,
    check_apart,
    check_model,
    check_refine,
    check_unplanned,
    keeping_for,
    read_calibration,
    request_of,
)
from .printing import errors, fail, progress_bars
from .show import check_complete, print_summary


def generate(
    context: typer.Context,
    model: Model,
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="The compressed checkpoint: a folder that GPTQModel or transformers loads, or a GGUF file."
        ),
    ],
    calibration: Calibration,
    rank: Rank = None,
    budget: Budget = None,
    preset: PresetName = None,
    sensitivity: Sensitivity = None,
    objective: Objective = OBJECTIVES[0],
    factor_bits: FactorBits = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="A plan.json of `eora plan --host`: ranks and bits of factors.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for the adapter, by default in the checkpoint; for a GGUF model a file, by default beside it.",
        ),
    ] = None,
    refine: RefineTokens = None,
    samples: Samples = DEFAULT_SAMPLES,
    seqlen: SeqLen = DEFAULT_SEQLEN,
    batch_size: BatchSize = 1,
    resume: Resume = True,
    restart: Restart = False,
    log_json: LogJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make an adapter for a checkpoint that is already quantised or pruned, by whatever tool. Killed at any moment, the
    same command goes on after the last finished layer."""
    check_refine(refine)
    ranks = None
    if plan is None:
        chosen = adapter_options(rank, budget, objective, factor_bits, sensitivity, preset)
    else:
        check_unplanned(context)
        chosen, ranks = _planned(plan)
    check_model(model, may_be_file=True)
    if not checkpoint.is_file():
        if not (checkpoint / "config.json").is_file():
            fail(f"`{checkpoint}` has no config.json; it is no checkpoint folder.")
        check_apart(checkpoint, model)
    if output is not None:
        check_apart(output, model)
        if output.resolve() == checkpoint.resolve():
            fail(f"`{output}` is the checkpoint; name another place for the adapter, inside or outside.")
    texts = read_calibration(calibration)

    from ..hosts.jobs import AdapterJob
    from ..hosts.refine import refine_checkpoint, refined_beside
    from ..hosts.registry import adapter_maker, base_folder
    from ..hosts.terminal import quiet

    start = time.perf_counter()
    target = output or (checkpoint if checkpoint.is_file() else checkpoint / DEFAULT_FOLDER)
    keeping = keeping_for(target, resume, restart)
    with errors(resumable=keeping is not None), progress_bars() as bar, quiet():
        request = request_of(context)
        make = adapter_maker(checkpoint)
        model = base_folder(model)
        job = AdapterJob(
            base=model,
            checkpoint=checkpoint,
            windows=tokenized(texts, model, samples, seqlen, trust_remote_code),
            adapter=chosen,
            output=output,
            ranks=ranks,
            batch_size=batch_size,
            loading={"trust_remote_code": trust_remote_code},
            report=bar("compensating layers"),
            keeping=keeping,
        )
        folder = target if keeping is not None and keeping.is_written(request) else make(job)
        if keeping is not None:
            keeping.mark_written(request)
        if refine is not None:
            made, folder = folder, refined_beside(folder)
            outcome = refine_checkpoint(
                checkpoint, model, read_calibration(calibration), adapter=made, output=folder, tokens=refine,
                trust_remote_code=trust_remote_code, teaching=bar("full precision"), training=bar("refining"),
            )  # fmt: skip
            check_complete(outcome)
    if is_first():
        print_summary(summarize(folder), time.perf_counter() - start)
    if keeping is not None:
        keeping.remove()


def _planned(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """What is asked of the adapter, and each module's rank, by a plan's file; fail where it plans no adapter."""
    with errors():
        plan = TypePlan.read(path)
    largest = max(plan.ranks.values(), default=0)
    if not largest:
        fail(f"`{path}` gives no module an adapter: the types alone are the best for that size.")
    return {"rank": largest, "factor_bits": plan.factor_bits}, plan.ranks
