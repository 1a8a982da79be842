"""The commands `eora ensemble make`, `add`, `route`, `eval` and `export`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..adapter.ensemble.folder import EnsembleFolder, check_name, export_pair
from ..adapter.options import AdapterOptions, as_flag
from ..adapter.presets import DEFAULT_BUDGET
from ..adapter.summary import summarize
from ..calibration import DEFAULT_SAMPLES, DEFAULT_SEQLEN, file_tokens, tokenized
from ..evaluate.size import readable
from .options import (
    BatchSize,
    Json,
    Model,
    Sensitivity,
    SeqLen,
    TrustRemoteCode,
    check_apart,
    check_model,
    check_out,
    check_text,
    read_calibration,
)
from .printing import errors, fail, out, progress_bars, say
from .show import print_summary

# The router is made of more text than factors are calibrated on: of it only the first layers are computed.
ROUTER_WINDOWS = 4
FACTOR_BITS = 4

ensemble = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich",
    help="Several adapters over one base: made for domains, mixed for each prompt by what it needs.",
)  # fmt: skip

Checkpoint = Annotated[Path, typer.Argument(help="Folder of the quantised checkpoint.")]
Path_ = Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint with an ensemble, or an ensemble's folder.")]
Domains = Annotated[
    list[str] | None, typer.Option("--domain", help="A domain and its text, as math=gsm8k.jsonl; once for each.")
]
Bits = Annotated[int, typer.Option("--factor-bits", help="Bits of a stored factor: 16, 8 or 4, of all alike.")]
Samples = Annotated[
    int, typer.Option(help=f"Windows of each text for factors; the router sees {ROUTER_WINDOWS} times as many.", min=1)
]


@ensemble.command(epilog="Example:  eora ensemble make Qwen/Qwen3-8B out out/eora --shared c4.jsonl "
                         "--domain math=gsm8k.jsonl --domain code=src.txt --budget 0.5bpw")  # fmt: skip
def make(
    base: Model,
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="Folder for the ensemble; in the checkpoint, this names it.")],
    shared: Annotated[
        str, typer.Option(help="General text. What serves every prompt is made of it and of the domains' text.")
    ],
    domains: Domains = None,
    budget: Annotated[str, typer.Option(help="Of all factors together: `300MB`, `0.5bpw`, `r32`.")] = DEFAULT_BUDGET,
    shared_part: Annotated[
        float | None, typer.Option(help="Share of the budget for the shared adapter; by default forecasts choose.")
    ] = None,
    factor_bits: Bits = FACTOR_BITS,
    sensitivity: Sensitivity = None,
    depth: Annotated[int, typer.Option(help="Layers without members, behind which the router looks.", min=1)] = 2,
    controls: Annotated[
        Path | None,
        typer.Option(help="Also make, in this folder, one adapter of all texts in all bytes (total) and one in those "
                          "that serve a prompt (active), for `eora ensemble eval`."),
    ] = None,
    samples: Samples = DEFAULT_SAMPLES,
    seqlen: SeqLen = DEFAULT_SEQLEN,
    batch_size: BatchSize = 1,
    force: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make an ensemble: a shared adapter, and for every domain a member that corrects what it leaves."""
    files = _domains(domains)
    _check_making(base, checkpoint, {"budget": budget, "factor_bits": factor_bits, "sensitivity": sensitivity})
    if controls is not None:
        check_out(controls, force, base)
    if shared_part is not None and not 0 < shared_part < 1:
        fail(f"--shared-part must be between 0 and 1, got {shared_part:g}.")
    if output.resolve() == checkpoint.resolve():
        fail(f"`{output}` is the checkpoint; name a folder of its own for the ensemble, inside or outside.")
    check_out(output, force, base)

    from ..hosts.ensemble_making import EnsembleJob, make_ensemble
    from ..hosts.terminal import quiet

    start = time.perf_counter()
    with errors(), progress_bars() as bar, quiet():
        most = samples * ROUTER_WINDOWS
        texts = {name: _windows(name, file, base, most, seqlen, trust_remote_code) for name, file in files.items()}
        job = EnsembleJob(
            base=base, checkpoint=checkpoint, output=output,
            shared=_windows("--shared", shared, base, most, seqlen, trust_remote_code), domains=texts, budget=budget,
            samples=samples, shared_part=shared_part, depth=depth, background=shared not in files.values(),
            controls=controls, adapter=_adapter(factor_bits, sensitivity), batch_size=batch_size,
            loading={"trust_remote_code": trust_remote_code}, report=bar,
        )  # fmt: skip
        make_ensemble(job)
    _print_ensemble(EnsembleFolder.open(output), time.perf_counter() - start)


@ensemble.command(epilog="Example:  eora ensemble add Qwen/Qwen3-8B out out/eora --domain law=law.jsonl --budget 2MB")
def add(
    base: Model,
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(metavar="ENSEMBLE", help="The ensemble's folder.")],
    domains: Domains = None,
    budget: Annotated[str, typer.Option(help="Of each new member's factors.")] = "0.1bpw",
    replace: Annotated[bool, typer.Option(help="Make a member that is there already anew.")] = False,
    sensitivity: Sensitivity = None,
    samples: Samples = DEFAULT_SAMPLES,
    seqlen: SeqLen = DEFAULT_SEQLEN,
    batch_size: BatchSize = 1,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Add a domain, from its text or from logged prompts; the other members stay as they are."""
    files = _domains(domains)
    with errors():
        opened = EnsembleFolder.open(output)
        known = [one.name for one in opened.members if not (replace and one.name in files)]
        for name in files:
            check_name(name, known)
    bits = opened.shared.factor_bits
    _check_making(base, checkpoint, {"budget": budget, "factor_bits": bits, "sensitivity": sensitivity})

    from ..hosts.ensemble_making import EnsembleJob, add_member
    from ..hosts.terminal import quiet

    start = time.perf_counter()
    with errors(), progress_bars() as bar, quiet():
        most = samples * ROUTER_WINDOWS
        texts = {name: _windows(name, file, base, most, seqlen, trust_remote_code) for name, file in files.items()}
        job = EnsembleJob(
            base=base, checkpoint=checkpoint, output=output, shared=(), domains=texts, budget=budget, samples=samples,
            depth=opened.depth, adapter=_adapter(bits, sensitivity), batch_size=batch_size,
            loading={"trust_remote_code": trust_remote_code}, report=bar,
        )  # fmt: skip
        add_member(job, replace=replace)
    _print_ensemble(EnsembleFolder.open(output), time.perf_counter() - start)


@ensemble.command(epilog='Example:  eora ensemble route out "What is 3 times 17?"')
def route(
    path: Path_,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Prompts.")],
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:0; by default the host's choice.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Tell what weights prompts would get, without generating: only the first layers are computed."""
    loaded, tokenizer = load(path, device, trust_remote_code)

    from ..hosts.ensemble import ensemble_of

    rows: list[dict[str, Any]] = []
    with errors():
        found = ensemble_of(loaded.model)
        for text in texts:
            routing = found.route(_ids(loaded, tokenizer, text))
            weights = dict(zip(found.members, routing.weights[0].tolist(), strict=True))
            rows.append({"text": text, "nearest": routing.nearest[0], "weights": weights,
                         "fallen_back": routing.fallen_back[0], "as_far": routing.tails[0]})  # fmt: skip
    if as_json:
        out.print_json(json.dumps({"routes": rows}))
        return
    table = Table("prompt", "nearest", *found.members, "its own text as far", "")
    for row in rows:
        shown = row["text"] if len(row["text"]) <= 40 else f"{row['text'][:39]}…"
        as_far = f"{row['as_far']:.0%}" if row["nearest"] else ""
        table.add_row(shown, row["nearest"] or "too short", *(f"{one:.2f}" for one in row["weights"].values()), as_far,
                      "shared alone" if row["fallen_back"] else "")  # fmt: skip
    out.print(table)


@ensemble.command(
    name="eval", epilog="Example:  eora ensemble eval out --domain math=test.jsonl --control total=controls/total"
)
def evaluate(
    path: Path_,
    domains: Annotated[
        list[str] | None, typer.Option("--domain", help="Held-out text of a domain, as math=test.jsonl; once for each.")
    ] = None,
    controls: Annotated[
        list[str] | None, typer.Option("--control", help="An adapter to compare with, as total=FOLDER.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.", min=32)] = 512,
    prompt: Annotated[int, typer.Option(help="Of which so many are the prompt, by which it is routed.", min=1)] = 64,
    max_windows: Annotated[int | None, typer.Option(help="Windows of each domain at most.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:0; by default the host's choice.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure the loss on every domain: without adapter, shared alone, routed, told, and by other adapters."""
    files = _domains(domains)
    others = {name: Path(folder) for name, folder in _pairs(controls or [], "--control").items()}
    for file in files.values():
        check_text(Path(file))
    for folder in others.values():
        with errors():
            summarize(folder)
    loaded, tokenizer = load(path, device, trust_remote_code)

    import torch

    from ..evaluate.ensemble import ensemble_losses
    from ..hosts.terminal import quiet

    most = None if max_windows is None else max_windows * window
    with errors(), progress_bars() as bar, quiet():
        ids = {name: torch.tensor(file_tokens(file, tokenizer, most=most)) for name, file in files.items()}
        found = ensemble_losses(loaded, ids, controls=others, window=window, prompt=prompt, max_windows=max_windows,
                                progress=bar)  # fmt: skip
    if as_json:
        out.print_json(json.dumps(asdict(found)))
        return
    table = Table("nats per token", *files)
    for contender, losses in found.losses.items():
        table.add_row(contender, *(f"{losses[name]:.4f}" for name in files))
    out.print(table)
    for name, nearest in found.routed_to.items():
        say(f"{name}: " + ", ".join(f"{share:.0%} nearest to {one}" for one, share in nearest.items())
            + f"; {found.fallen_back[name]:.0%} fell back, of {found.windows[name]} windows")  # fmt: skip


@ensemble.command(epilog="Example:  eora ensemble export out/eora adapters/math --member math")
def export(
    path: Annotated[Path, typer.Argument(metavar="ENSEMBLE", help="The ensemble's folder.")],
    output: Annotated[Path, typer.Argument(help="Folder for the copy.")],
    member: Annotated[
        str | None, typer.Option(help="The member to join with the shared adapter; without it, that alone.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
) -> None:
    """Write the shared adapter and a member as one plain PEFT adapter, which opens anywhere."""
    check_out(output, force, path)
    with errors():
        export_pair(EnsembleFolder.open(path), member, output)
    print_summary(summarize(output))


def _pairs(given: list[str], option: str) -> dict[str, str]:
    """NAME=VALUE of an option that may be given several times."""
    found: dict[str, str] = {}
    for one in given:
        name, _, value = one.partition("=")
        if not name or not value:
            fail(f"{option} must look like name=value, got `{one}`.")
        if name in found:
            fail(f"{option} names {name} twice.")
        found[name] = value
    return found


def _domains(given: list[str] | None) -> dict[str, str]:
    """Name → file of each domain; fail for a name that cannot be or overlaps."""
    found = _pairs(given or [], "--domain")
    if not found:
        fail("no domain is named. Give at least one: --domain name=file.")
    names: list[str] = []
    with errors():
        for name in found:
            check_name(name, names)
            names.append(name)
    return found


def _check_making(base: str, checkpoint: Path, asked: dict[str, Any]) -> None:
    check_model(base)
    if not (checkpoint / "config.json").is_file():
        fail(f"`{checkpoint}` has no config.json; it is no checkpoint folder.")
    check_apart(checkpoint, base)
    with errors():
        AdapterOptions.settle(**asked, label=as_flag)


def _adapter(factor_bits: int, sensitivity: str | None) -> dict[str, Any]:
    return {"factor_bits": factor_bits, **({} if sensitivity is None else {"sensitivity": sensitivity})}


def _windows(name: str, file: str, base: str, most: int, seqlen: int, trust_remote_code: bool) -> Any:
    try:
        return tokenized(read_calibration(file), base, most, seqlen, trust_remote_code)
    except ValueError as error:
        fail(f"{name}: {error}")


def load(path: Path, device: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """A checkpoint with its ensemble, and its tokenizer."""
    from transformers import AutoTokenizer

    from ..hosts.ensemble import checkpoint_of, ensemble_of
    from ..hosts.registry import loader
    from ..hosts.terminal import quiet

    with errors(), quiet():
        checkpoint, folder = checkpoint_of(path)
        loaded = loader(checkpoint)(checkpoint, folder, device=device, trust_remote_code=trust_remote_code)
        ensemble_of(loaded.model)
        return loaded, AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)


def _ids(loaded: Any, tokenizer: Any, text: str) -> Any:
    return tokenizer(text, return_tensors="pt").input_ids.to(loaded.model.device)


def _print_ensemble(made: EnsembleFolder, seconds: float) -> None:
    table = Table("adapter", "bytes", "calibrated on")
    table.add_row("shared", readable(made.shared.weights.stat().st_size), "")
    for member in made.members:
        size = made.folders[member.name].weights.stat().st_size
        table.add_row(member.name, readable(size), f"{member.tokens} tokens")
    out.print(table)
    say(f"{made.path}: {readable(made.nbytes)} in all, made in {seconds:.0f} s")
