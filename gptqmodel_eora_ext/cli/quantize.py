"""The command `eora quantize`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..adapter.summary import summarize
from ..adapter.validate import validate_choice
from ..adapter.vocabulary import OBJECTIVES
from ..calibration import DEFAULT_SAMPLES, DEFAULT_SEQLEN, tokenized
from ..plan import QUANTIZERS
from ..system.distributed import is_first
from .options import (
    DEFAULT_GROUP_SIZE,
    FORMATS,
    ITERS,
    QUANTIZED_BITS,
    BatchSize,
    Budget,
    Calibration,
    FactorBits,
    GroupSize,
    LogJson,
    Model,
    Objective,
    PlanFile,
    PresetName,
    Rank,
    RefineTokens,
    Restart,
    Resume,
    Rounds,
    Samples,
    Sensitivity,
    SeqLen,
    TrustRemoteCode,
    adapter_options,
    check_format,
    check_group_size,
    check_model,
    check_out,
    check_refine,
    given,
    keeping_for,
    read_calibration,
    read_plan,
    request_of,
)
from .printing import errors, fail, note, progress_bars, say
from .recipe import DEFAULT_EFFORT, check_recipe, quantize_by_recipe
from .show import check_complete, print_summary

GPTQ, AUTOROUND = QUANTIZERS
# Options that only one of them has.
OF_QUANTIZER = {GPTQ: ("desc_act", "mse", "rounds"), AUTOROUND: ("iters", "format")}


def quantize(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the checkpoint; the adapter goes inside.")],
    calibration: Calibration,
    total: Annotated[
        str | None,
        typer.Option(
            help="Size of weights, scales, zeros and factors, as `2.75bpw` (bits per quantised weight) or `300MB`. "
            "A recipe for that size (quantiser, widths, ranks, refinement) is picked, shown and run."
        ),
    ] = None,
    effort: Annotated[
        str, typer.Option(help="For --total: fast (minutes), balanced, or best (hours on a CPU).")
    ] = DEFAULT_EFFORT,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --total: show what is picked, and stop.")] = False,
    quantizer: Annotated[
        str, typer.Option(help="gptq, in GPTQModel's loop, or autoround, in AutoRound's: slower, and better at 2 bits.")
    ] = GPTQ,
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 2,
    group_size: GroupSize = DEFAULT_GROUP_SIZE,
    rank: Rank = None,
    budget: Budget = None,
    plan_file: PlanFile = None,
    preset: PresetName = None,
    sensitivity: Sensitivity = None,
    objective: Objective = OBJECTIVES[0],
    factor_bits: FactorBits = None,
    rounds: Rounds = None,
    refine: RefineTokens = None,
    samples: Samples = DEFAULT_SAMPLES,
    seqlen: SeqLen = DEFAULT_SEQLEN,
    batch_size: BatchSize = 1,
    sym: Annotated[bool, typer.Option(help="Symmetric quantisation.")] = True,
    desc_act: Annotated[bool, typer.Option(help="Quantise columns in order of activation size.")] = False,
    mse: Annotated[float, typer.Option(help="GPTQModel's search for scales; 0 is off.", min=0)] = 0.0,
    iters: Annotated[int, typer.Option(help="AutoRound's tuning steps a block; 0 rounds to nearest.", min=0)] = ITERS,
    format: Annotated[str, typer.Option(help=f"AutoRound's export: {', '.join(FORMATS)}.")] = FORMATS[0],
    force: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    resume: Resume = True,
    restart: Restart = False,
    log_json: LogJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Quantise a model, and compensate each module right after it is quantised. Killed at any moment, the same command
    goes on after the last finished layer."""
    check_recipe(context, total)
    keeping = keeping_for(output, resume, restart)
    if total is not None:
        quantize_by_recipe(
            model, output, calibration, total=total, effort=effort, dry_run=dry_run,
            form=format if given(context, "format") else None, samples=samples, seqlen=seqlen,
            batch_size=batch_size if given(context, "batch_size") else None, force=force, keeping=keeping,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        return
    _check_quantizer(context, quantizer)
    chosen = adapter_options(rank, budget, objective, factor_bits, sensitivity, preset, rounds)
    if bits not in QUANTIZED_BITS:
        fail(f"--bits must be one of {', '.join(map(str, QUANTIZED_BITS))}, got {bits}.")
    check_group_size(group_size)
    check_refine(refine)
    planned = read_plan(context, plan_file) if plan_file else None
    if planned and refine is not None and not planned.largest_rank:
        fail("--refine trains an adapter, and the plan gives no module one. Leave --refine out.")
    if planned and planned.quantizer != quantizer:
        note(
            f"`{plan_file}` was planned for {planned.quantizer}, and {quantizer} runs it; another mix may suit it "
            f"better. Make one by `eora plan --quantizer {quantizer}`."
        )
    settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": sym}
    if quantizer == AUTOROUND:
        check_format(format, *([bits] if planned is None else {one.bits for one in planned.modules.values()}))
        settings |= {"iters": iters, "format": format}
    else:
        settings |= {"mse": mse, "desc_act": desc_act, **(planned.quantize_config() if planned else {})}
    check_model(model)
    check_out(output, force or (keeping is not None and keeping.exists), model)
    texts = read_calibration(calibration)

    from ..hosts.jobs import QuantizeJob
    from ..hosts.refine import refine_checkpoint
    from ..hosts.registry import quantizer as serving
    from ..hosts.terminal import quiet

    start = time.perf_counter()
    with errors(resumable=keeping is not None), progress_bars() as bar, quiet():
        request = request_of(context)
        job = QuantizeJob(
            model=model,
            output=output,
            windows=tokenized(texts, model, samples, seqlen, trust_remote_code),
            settings=settings,
            adapter=None if planned else chosen,
            plan=planned,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
            report=bar("quantising layers"),
            keeping=keeping,
        )
        if keeping is None or not keeping.is_written(request):
            serving(quantizer)(job)
        if keeping is not None:
            keeping.mark_written(request)
        if refine is not None:
            outcome = refine_checkpoint(
                output, model, read_calibration(calibration), tokens=refine, trust_remote_code=trust_remote_code,
                teaching=bar("full precision"), training=bar("refining"),
            )  # fmt: skip
            check_complete(outcome)
    if is_first() and (planned is None or planned.largest_rank):
        print_summary(summarize(output), time.perf_counter() - start)
    say(f'Load it:  GPTQModel.load("{output}")')
    if keeping is not None:
        # Last: from here on the same command would find a folder that is not empty, and no run to go on with.
        keeping.remove()


def _check_quantizer(context: typer.Context, quantizer: str) -> None:
    """Fail for a quantiser that nobody serves, and for an option that only another one has."""
    with errors():
        validate_choice(quantizer, QUANTIZERS, what="--quantizer")
    for owner, names in OF_QUANTIZER.items():
        for name in names:
            if owner != quantizer and given(context, name):
                fail(f"--{name.replace('_', '-')} is of --quantizer {owner}, got --quantizer {quantizer}.")
