"""The command `eora`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from . import __version__
from .adapter import DEFAULT_RANK, OBJECTIVES, validate_rank
from .calibration import DEFAULT_SAMPLES, DEFAULT_SEQLEN, windows
from .cli_plan import plan
from .evaluate.perplexity import DEFAULT_WINDOW
from .evaluate.size import readable, weight_bytes
from .hosts.peft import AdapterFolder, export_peft
from .kernel_report import MANY_ROWS, kernel_report
from .options import (
    DEFAULT_GROUP_SIZE,
    QUANTIZED_BITS,
    BatchSize,
    Budget,
    Calibration,
    FactorBits,
    GroupSize,
    Json,
    Model,
    Objective,
    PlanFile,
    PresetName,
    Rank,
    Rounds,
    Samples,
    Sensitivity,
    SeqLen,
    adapter_options,
    check_group_size,
    check_model,
    check_out,
    errors,
    fail,
    out,
    progress_bars,
    read_calibration,
    read_plan,
)
from .study_command import EXAMPLE as STUDY_EXAMPLE
from .study_command import study
from .summary import AdapterSummary, find_adapter, summarize

app = typer.Typer(
    name="eora",
    help="Training-free low-rank adapters that win back what quantisation loses, for GPTQModel.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
WORST_MODULES = 10


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command(epilog="Example:  eora quantize Qwen/Qwen3-8B out/qwen3-8b-2bit --bits 2 --rank 64 --calibration c4.jsonl")
def quantize(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the checkpoint; the adapter goes inside.")],
    calibration: Calibration,
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
    samples: Samples = DEFAULT_SAMPLES,
    seqlen: SeqLen = DEFAULT_SEQLEN,
    batch_size: BatchSize = 1,
    sym: Annotated[bool, typer.Option(help="Symmetric quantisation.")] = True,
    desc_act: Annotated[bool, typer.Option(help="Quantise columns in order of activation size.")] = False,
    mse: Annotated[float, typer.Option(help="GPTQModel's search for scales; 0 is off.", min=0)] = 0.0,
    force: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Allow model code from the hub.")] = False,
) -> None:
    """Quantise a model by GPTQ and compensate each module right after it is quantised."""
    chosen = adapter_options(rank, budget, objective, factor_bits, sensitivity, preset, rounds)
    if bits not in QUANTIZED_BITS:
        fail(f"--bits must be one of {', '.join(map(str, QUANTIZED_BITS))}, got {bits}.")
    check_group_size(group_size)
    settings = {"bits": bits, "group_size": group_size, "sym": sym, "mse": mse}
    planned = read_plan(context, plan_file) if plan_file else None
    if planned:
        settings = planned.quantize_config()
    check_model(model)
    check_out(output, force)
    texts = read_calibration(calibration)

    from .hosts.terminal import quiet, watch_layers

    start = time.perf_counter()
    with errors(), progress_bars() as bar, quiet():
        from gptqmodel import GPTQModel, QuantizeConfig
        from transformers import AutoTokenizer

        from .hosts.gptqmodel.adapter import EoRA
        from .hosts.gptqmodel.planned import check_plan

        data = windows(texts, AutoTokenizer.from_pretrained(model), samples=samples, seqlen=seqlen)
        config = QuantizeConfig(**settings, desc_act=desc_act)
        host = GPTQModel.load(model, config, trust_remote_code=trust_remote_code)
        watch_layers(host, bar("quantising layers"))
        if planned:
            check_plan(host, planned)
            # A plan may find plain weights of mixed widths the best.
            adapter = EoRA(plan=planned) if planned.largest_rank else None
        else:
            adapter = EoRA(**chosen)
        host.quantize(data, batch_size=batch_size, adapter=adapter)
        host.save(str(output))
    if adapter is not None:
        _print_summary(summarize(output), time.perf_counter() - start)
    out.print(f'Load it:  GPTQModel.load("{output}")', highlight=False)


@app.command(
    epilog="Example:  eora generate Qwen/Qwen3-8B out/qwen3-8b-2bit --rank 64 --calibration c4.jsonl --out adapters/r64"
)
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
    samples: Samples = DEFAULT_SAMPLES,
    seqlen: SeqLen = DEFAULT_SEQLEN,
    batch_size: BatchSize = 1,
    trust_remote_code: Annotated[bool, typer.Option(help="Allow model code from the hub.")] = False,
) -> None:
    """Make an adapter for a checkpoint that is already quantised."""
    chosen = adapter_options(rank, budget, objective, factor_bits, sensitivity, preset)
    check_model(model)
    if not (checkpoint / "config.json").is_file():
        fail(f"`{checkpoint}` has no config.json; it is no checkpoint folder.")
    texts = read_calibration(calibration)

    from .hosts.terminal import quiet

    start = time.perf_counter()
    with errors(), progress_bars() as bar, quiet():
        from transformers import AutoTokenizer

        from .hosts.gptqmodel.adapter import EoRA
        from .hosts.gptqmodel.generate import generate_adapter

        data = windows(texts, AutoTokenizer.from_pretrained(model), samples=samples, seqlen=seqlen)
        folder = generate_adapter(
            EoRA(path=output, **chosen),
            model,
            checkpoint,
            data,
            batch_size=batch_size,
            report=bar("compensating layers"),
            loading={"trust_remote_code": trust_remote_code},
        )
    _print_summary(summarize(folder), time.perf_counter() - start)


@app.command(epilog="Example:  eora inspect out/qwen3-8b-2bit --modules")
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint with an adapter, or an adapter folder.")],
    modules: Annotated[bool, typer.Option("--modules", help="List every module, not only the worst.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="List which kernel multiplies each module here, and why not a faster one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell what an adapter is: ranks, bytes, objective, calibration, versions, error before and after per module."""
    with errors():
        summary = summarize(path)
        rows = kernel_report(path, summary) if kernels else []
    if as_json:
        listed = {"kernels": [row.as_json() for row in rows]} if kernels else {}
        out.print_json(json.dumps({**summary.as_json(), **listed}))
        return
    _print_summary(summary)
    if kernels:
        table = Table(
            "module", "out × in", "bits", "group", "rank", "one row", f"{MANY_ROWS} rows", "why not a faster one"
        )
        for row in rows:
            table.add_row(row.module, f"{row.out_features} × {row.in_features}", str(row.bits), str(row.group_size),
                          str(row.rank), row.one_row, row.many_rows, row.reason)  # fmt: skip
        out.print(table)
        return
    worst = sorted(summary.modules.items(), key=lambda item: -item[1]["error_after"] / (item[1]["signal"] or 1))
    if not worst:
        out.print("No eora.json: another tool made this adapter, so errors are not known.")
        return
    shown = worst if modules else worst[:WORST_MODULES]
    table = Table("module", "rank", "tokens", "error before", "after", "left",
                  title=None if modules else "Largest errors",
                  caption="error: E‖ΔW x‖² / E‖W x‖², the output's relative error on calibration data")  # fmt: skip
    for name, report in shown:
        signal, before = report["signal"] or 1, report["error_before"]
        left = f"{report['error_after'] / before:.0%}" if before else "-"
        table.add_row(name, str(report["rank"]), str(report["tokens"]), f"{before / signal:.2%}",
                      f"{report['error_after'] / signal:.2%}", left)  # fmt: skip
    out.print(table)


app.command(epilog="Example:  eora plan Qwen/Qwen3-8B --calibration c4.jsonl --total 2.5bpw --out plan.json")(plan)


@app.command(epilog="Example:  eora export out/qwen3-8b-2bit --peft adapters/plain")
def export(
    path: Annotated[Path, typer.Argument(help="A checkpoint with an adapter, or an adapter folder.")],
    peft: Annotated[Path, typer.Option("--peft", help="Folder for a plain PEFT copy with 16-bit factors.")],
    force: Annotated[bool, typer.Option(help="Replace a folder that is there.")] = False,
) -> None:
    """Write a copy of an adapter that PEFT, vLLM and GPTQModel open without this plugin."""
    check_out(peft, force)
    with errors():
        folder = find_adapter(path)
        assert folder is not None
        export_peft(AdapterFolder.open(folder), peft)
    _print_summary(summarize(peft))


@app.command(name="eval", epilog="Example:  eora eval out/qwen3-8b-2bit --text heldout.txt")
def evaluate(
    path: Annotated[Path, typer.Argument(help="A quantised checkpoint.")],
    text: Annotated[Path, typer.Option(help="Held-out text.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter folder; by default the one that the checkpoint names.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = DEFAULT_WINDOW,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Perplexity of a text, with and without the adapter."""
    if not text.is_file():
        fail(f"there is no file `{text}`.")
    if not (path / "config.json").is_file():
        fail(f"`{path}` has no config.json; it is no checkpoint folder.")
    with errors():
        folder = adapter or find_adapter(path, required=False)
        if folder is not None:
            AdapterFolder.open(folder)

    from .evaluate.report import measure_checkpoint

    with errors(), progress_bars() as bar:
        rows = measure_checkpoint(path, folder, text, window=window, max_windows=max_windows, progress=bar)
    if as_json:
        out.print_json(json.dumps(rows))
        return
    table = Table("model", "perplexity", "loss (nats)", "tokens", "bytes")
    for row in rows:
        table.add_row(row["model"], f"{row['perplexity']:.3f}", f"{row['nats']:.4f}", str(row["tokens"]),
                      readable(row["bytes"]))  # fmt: skip
    out.print(table)


@app.command(epilog="Example:  eora demo --out demo")
def demo(
    output: Annotated[Path, typer.Option("--out", help="Folder for the quantised models.")] = Path("demo"),
    bits: Annotated[int, typer.Option(help="2, 3 or 4.", min=2, max=4)] = 2,
    rank: Annotated[int, typer.Option(help="Components per module.")] = DEFAULT_RANK,
) -> None:
    """Quantise SmolLM2-135M with an adapter, load it again in a new process, and show what was won back."""
    with errors():
        validate_rank(rank, what="--rank")

    from .evaluate.demo import run_demo

    with errors(), progress_bars() as bar:
        rows, seconds = run_demo(output, bits=bits, rank=rank, progress=bar)
    table = Table("model", "perplexity", "on disk", "of it adapter", "seconds", title=f"SmolLM2-135M, {bits} bits")
    for row in rows:
        table.add_row(row["model"], f"{row['perplexity']:.1f}", readable(row["bytes"]),
                      readable(row["adapter_bytes"]) if row["adapter_bytes"] else "",
                      f"{row['seconds']:.0f}")  # fmt: skip
    out.print(table)
    out.print(f"Held-out text: a novel that calibration did not see. {seconds:.0f} s in all. "
              f'Load it:  GPTQModel.load("{os.fspath(output)}/eora")', highlight=False)  # fmt: skip


app.command(epilog=STUDY_EXAMPLE)(study)


def _print_summary(summary: AdapterSummary, seconds: float | None = None) -> None:
    details = summary.details
    ranks = sorted(set(summary.ranks.values()))
    table = Table.grid(padding=(0, 2))
    table.add_row("adapter", str(summary.folder))
    table.add_row(
        "modules", f"{len(summary.ranks)}, rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}"
    )
    table.add_row("bytes", f"{readable(summary.bytes)}, factors in {summary.factor_bits} bits")
    checkpoint = weight_bytes(summary.folder.parent)
    if checkpoint:
        table.add_row("checkpoint", f"{readable(checkpoint)} without the adapter")
    if details:
        data = details.get("calibration", {})
        versions = ", ".join(f"{name} {found}" for name, found in details.get("versions", {}).items())
        if allocation := details.get("allocation"):
            spent, budget = (readable(allocation[key]) for key in ("spent", "budget"))
            table.add_row("budget", f"{spent} of {budget}, ranks by {allocation['sensitivity']} sensitivity")
        table.add_row("objective", f"{details.get('objective')}, after {details.get('method')}")
        table.add_row("calibration", f"{data.get('tokens')} tokens, sha256 {str(data.get('sha256'))[:12]}…")
        table.add_row("error left", f"{summary.error_left():.1%} of the weighted error (geometric mean over modules)")
        table.add_row("made by", versions)
    if seconds is not None:
        table.add_row("seconds", f"{seconds:.0f}")
    out.print(table)


if __name__ == "__main__":
    app()
