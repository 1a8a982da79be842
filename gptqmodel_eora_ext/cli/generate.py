"""The command `eora generate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..adapter.summary import summarize
from ..adapter.vocabulary import OBJECTIVES
from ..calibration import DEFAULT_SAMPLES, DEFAULT_SEQLEN
from .options import (
    BatchSize,
    Budget,
    Calibration,
    FactorBits,
    Model,
    Objective,
    PresetName,
    Rank,
    RefineTokens,
    Samples,
    Sensitivity,
    SeqLen,
    TrustRemoteCode,
    adapter_options,
    check_apart,
    check_model,
    check_refine,
    read_calibration,
    tokenized,
)
from .printing import errors, fail, progress_bars
from .show import print_summary


def generate(
    model: Model,
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the quantised checkpoint.")],
    calibration: Calibration,
    rank: Rank = None,
    budget: Budget = None,
    preset: PresetName = None,
    sensitivity: Sensitivity = None,
    objective: Objective = OBJECTIVES[0],
    factor_bits: FactorBits = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder for the adapter; by default inside the checkpoint.")
    ] = None,
    refine: RefineTokens = None,
    samples: Samples = DEFAULT_SAMPLES,
    seqlen: SeqLen = DEFAULT_SEQLEN,
    batch_size: BatchSize = 1,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make an adapter for a checkpoint that is already quantised."""
    chosen = adapter_options(rank, budget, objective, factor_bits, sensitivity, preset)
    check_refine(refine)
    check_model(model)
    if not (checkpoint / "config.json").is_file():
        fail(f"`{checkpoint}` has no config.json; it is no checkpoint folder.")
    check_apart(checkpoint, model)
    if output is not None:
        check_apart(output, model)
        if output.resolve() == checkpoint.resolve():
            fail(f"`{output}` is the checkpoint; name a folder of its own for the adapter, inside or outside.")
    texts = read_calibration(calibration)

    from ..hosts.refine import refine_checkpoint
    from ..hosts.registry import AdapterJob, adapter_maker
    from ..hosts.terminal import quiet

    start = time.perf_counter()
    with errors(), progress_bars() as bar, quiet():
        job = AdapterJob(
            base=model,
            checkpoint=checkpoint,
            windows=tokenized(texts, model, samples, seqlen, trust_remote_code),
            adapter=chosen,
            output=output,
            batch_size=batch_size,
            loading={"trust_remote_code": trust_remote_code},
            report=bar("compensating layers"),
        )
        folder = adapter_maker(checkpoint)(job)
        if refine is not None:
            made, folder = folder, folder.with_name(f"{folder.name}-refined")
            refine_checkpoint(
                checkpoint, model, read_calibration(calibration), adapter=made, output=folder, tokens=refine,
                trust_remote_code=trust_remote_code, teaching=bar("full precision"), training=bar("refining"),
            )  # fmt: skip
    print_summary(summarize(folder), time.perf_counter() - start)
