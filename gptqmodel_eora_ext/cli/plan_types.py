"""`eora plan --host`: types of a host's own files and ranks, under one size."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.table import Table

from ..adapter.budget import parse_budget
from ..adapter.validate import validate_choice
from ..adapter.vocabulary import FACTOR_BITS, SENSITIVITIES
from ..calibration import tokenized
from ..evaluate.size import readable
from ..hosts.jobs import TypePlanJob, TypePlanned
from ..hosts.registry import base_folder, type_planner
from ..system.distributed import refuse_shared
from ..system.progress import counted
from .options import check_model, read_calibration
from .printing import errors, fail, out, progress_bars, say

# Options of `eora plan` that say how weights will be rounded, or ask for a sweep; files say the first themselves.
OF_BITS = ("quantizer", "iters", "bits", "group_size", "budgets", "sym", "mse", "picture")


def plan_types(
    context: typer.Context,
    model: str,
    calibration: str,
    *,
    host: str | None,
    files: Sequence[Path],
    total: str | None,
    plan_file: Path | None,
    factor_bits: Sequence[int] | None,
    sensitivity: str,
    samples: int,
    seqlen: int,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Plan types and ranks; the arguments are the options of `eora plan`."""
    _check(context, host, files, total, plan_file, factor_bits)
    assert host is not None and total is not None
    with errors():
        refuse_shared("a plan of types (--host)", "Start it without torchrun")
        validate_choice(sensitivity, SENSITIVITIES, what="--sensitivity")
        parse_budget(total, what="--total")
        planner = type_planner(host)
    check_model(model, may_be_file=True)
    texts = read_calibration(calibration)

    from ..hosts.terminal import quiet

    with errors(), progress_bars() as bar, quiet():
        model = base_folder(model)
        job = TypePlanJob(
            base=model,
            files=files,
            total=total,
            factor_bits=factor_bits[0] if factor_bits else min(FACTOR_BITS),
            sensitivity=sensitivity,
            windows=tokenized(texts, model, samples, seqlen, trust_remote_code),
            trust_remote_code=trust_remote_code,
            bar=lambda title: counted(bar(title)),
        )
        found = planner(job)
        steps = found.write(plan_file) if plan_file is not None else []
    if as_json:
        out.print_json(json.dumps(_as_json(found)))
        return
    _print(found, steps)


def _check(
    context: typer.Context,
    host: str | None,
    files: Sequence[Path],
    total: str | None,
    plan_file: Path | None,
    factor_bits: Sequence[int] | None,
) -> None:
    if host is None:
        fail("--gguf needs a --host, for instance --host llamacpp.")
    if not files or total is None:
        fail(f"--host {host} needs a --total, and a --gguf for each type on offer.")
    for name in OF_BITS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            shown = "budget" if name == "budgets" else name.replace("_", "-")
            fail(f"--{shown} says how GPTQModel will round weights; with --host the files of --gguf say it.")
    missing = next((path for path in files if not path.is_file()), None)
    if missing is not None:
        fail(f"there is no file `{missing}`.")
    if factor_bits is not None and (len(factor_bits) > 1 or factor_bits[0] not in FACTOR_BITS):
        fail(f"--host {host} plans one width of factors: 16, 8 or 4, got {', '.join(map(str, factor_bits))}.")
    if plan_file is not None and (plan_file.is_dir() or not plan_file.absolute().parent.is_dir()):
        fail(f"`{plan_file}` cannot be written; name a file in a folder that is there.")


def _as_json(found: TypePlanned) -> dict[str, object]:
    plan = found.plan
    return {
        "bytes": plan.nbytes,
        "loss": plan.loss,
        "modules": {name: vars(one) for name, one in plan.modules.items()},
        "plain": {name: {"bytes": nbytes, "loss": loss} for name, (nbytes, loss) in found.plain.items()},
    }


def _print(found: TypePlanned, steps: Sequence[str]) -> None:
    plan = found.plan
    rows = [(name, nbytes, loss) for name, (nbytes, loss) in found.plain.items()]
    table = Table("", "weights and factors", "bpw", "predicted loss",
                  caption="predicted loss: nats a token above full precision, to compare by")  # fmt: skip
    for name, nbytes, loss in sorted([*rows, ("plan", plan.nbytes, plan.loss)], key=lambda one: one[1]):
        table.add_row(name, readable(nbytes), f"{8 * nbytes / found.weights:.3f}", f"{loss:.4f}")
    out.print(table)
    types = Counter(one.type for one in plan.modules.values())
    ranks = [rank for rank in plan.ranks.values() if rank]
    shown = f"{len(ranks)} modules of rank {min(ranks)} to {max(ranks)}" if ranks else "none is worth its bytes"
    say("types:    " + ", ".join(f"{count} {kind}" for kind, count in types.most_common()))
    say(f"adapter:  {shown}")
    for step in steps:
        say(f"Run it:   {step}")
    if not steps:
        say("Write it by --out plan.json.")
