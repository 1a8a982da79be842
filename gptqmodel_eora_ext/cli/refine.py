"""The command `eora refine`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..adapter.options import as_flag
from ..adapter.summary import find_adapter, summarize
from ..refine import CHOICES, DEFAULT_LOSS, DEFAULT_TOKENS, DEFAULT_WINDOW, NATURAL_TOKENS, RefineSettings
from ..system.distributed import is_first
from .options import Calibration, LogJson, Restart, TrustRemoteCode, check_apart, check_model, read_calibration
from .printing import errors, fail, progress_bars
from .show import check_complete, print_summary


def refine(
    checkpoint: Annotated[Path, typer.Argument(help="The quantised checkpoint: a folder, or a GGUF file.")],
    base: Annotated[str, typer.Option(help="The full-precision model: a folder, or a name on the Hugging Face hub.")],
    calibration: Calibration,
    tokens: Annotated[
        str | None,
        typer.Option(
            help=f"Tokens of calibration, as 160000 or 160k; a fifth validates, the others train. By default "
            f"{DEFAULT_TOKENS}; {NATURAL_TOKENS} with the loss natural."
        ),
    ] = None,
    loss: Annotated[str, typer.Option(help=f"What is lowered: {', '.join(CHOICES)}.")] = DEFAULT_LOSS,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Adapter to begin with; by default the one that the checkpoint names. For a GGUF model its file."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for the refined adapter; by default `eora-refined` in the checkpoint. For a GGUF model a "
            "file; by default beside the adapter.",
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.", min=16)] = DEFAULT_WINDOW,
    learning_rate: Annotated[float | None, typer.Option(help="Of the first step; 0.001 by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the windows.", min=0)] = 0,
    passes: Annotated[int, typer.Option(help="How many times each window that trains is used.", min=1)] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:0; by default the host's choice.")] = None,
    restart: Restart = False,
    log_json: LogJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train an adapter's factors together, by what the whole model loses against full precision. Ctrl-C ends it with
    the best so far; the same command goes on from there."""
    settings: dict[str, Any] = {
        "loss": loss, "tokens": tokens, "window": window, "learning_rate": learning_rate, "seed": seed,
        "passes": passes,
    }  # fmt: skip
    with errors():
        RefineSettings.settle(**settings, label=as_flag)
        if not checkpoint.is_file():
            if not (checkpoint / "config.json").is_file():
                fail(f"`{checkpoint}` has no config.json; it is no checkpoint folder.")
            find_adapter(checkpoint if adapter is None else adapter)
    check_model(base, may_be_file=checkpoint.is_file())
    if not checkpoint.is_file():
        check_apart(checkpoint, base)
    if output is not None:
        check_apart(output, base)
        if output.resolve() == checkpoint.resolve():
            fail(f"`{output}` is the checkpoint; name a folder of its own for the adapter, inside or outside.")
    texts = read_calibration(calibration)

    from ..hosts.refine import refine_checkpoint, refined_output
    from ..hosts.terminal import quiet

    start = time.perf_counter()
    with errors(resumable=True), progress_bars() as bar, quiet():
        outcome = refine_checkpoint(
            checkpoint,
            base,
            texts,
            adapter=adapter,
            output=output,
            **settings,
            device=device,
            restart=restart,
            trust_remote_code=trust_remote_code,
            teaching=bar("full precision"),
            training=bar("refining"),
        )
    if is_first():
        print_summary(summarize(refined_output(checkpoint, adapter, output)), time.perf_counter() - start)
    check_complete(outcome)
