"""What do the recipes of `eora quantize --total` lose, beside uniform AutoRound with an adapter and planned GPTQ mixes?

Losses are nats a token above full precision on held-out WikiText-2 and C4, of models as they are stored, and sizes are
bytes on disk of codes, scales, zeros and factors. Recipes are run as the command runs them, on C4. "uniform" is
AutoRound at the most bits that fit, with one rank for all in its loop for the rest of the total; it is not refined.
Planned mixes of GPTQ are taken over from `plan.py`, whose texts and windows these are; those it lacks are measured.

    python benchmarks/recipes.py --totals 2.5bpw --contenders best
    python benchmarks/recipes.py --out recipes

What a cell makes is kept below `--work` until its row is written: a cell that was interrupted while it refined goes on
there, and one that was interrupted before begins anew. Results are kept after every cell.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import common
import torch
from recovery import module_shapes

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.adapter.budget import budget_bytes, largest_uniform_rank
from gptqmodel_eora_ext.adapter.naming import DEFAULT_FOLDER
from gptqmodel_eora_ext.evaluate.size import COUNTED, tensor_bytes
from gptqmodel_eora_ext.hosts.jobs import QuantizeJob
from gptqmodel_eora_ext.hosts.recipes import FORMAT, prepare_recipe, run_recipe
from gptqmodel_eora_ext.hosts.refine import DEFAULT_REFINED
from gptqmodel_eora_ext.hosts.registry import quantizer
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.plan import EFFORTS, PLANNED_BITS
from gptqmodel_eora_ext.plan.modules import plain_bytes
from gptqmodel_eora_ext.plan.recipes import AUTOROUND, AUTOROUND_BATCH, FACTOR_BITS, GROUP_SIZE, TABLE
from gptqmodel_eora_ext.system.files import cache_folder

# 16k tokens, as `autoround.py`: with them a run of AutoRound takes ten minutes of one core.
SAMPLES, SEQLEN = 64, 256
TEXTS = ("wikitext2", "c4")
UNIFORM, MIX = "uniform", "mix"
CONTENDERS = ("best", UNIFORM, MIX, "balanced", "fast")
# What "best" is to lose at most, by total: nats on `TEXTS`.
TARGETS = {"2.5bpw": (0.70, 0.45), "2.75bpw": (0.52, 0.36), "3.0bpw": (0.40, 0.28), "3.25bpw": (0.30, 0.21)}
# How often a step that takes hours tells how far it is.
TOLD_SECONDS = 60


@dataclass(frozen=True)
class Cell:
    """A model: of a contender, in bytes of a total."""

    total: str
    contender: str


def cell_of(run: dict[str, Any]) -> Cell:
    return Cell(**{one.name: run[one.name] for one in fields(Cell)})


def place(work: Path, cell: Cell, base: common.Subject) -> Path:
    return work / f"{cell.contender}-{cell.total}{base.suffix}"


def telling(cell: Cell) -> Callable[[str], Callable[..., None]]:
    """Bars that print a line once a minute."""

    def bar(title: str) -> Callable[..., None]:
        last = 0.0

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal last
            if time.monotonic() - last > TOLD_SECONDS or done == total:
                last = time.monotonic()
                print(f"{cell.contender} {cell.total}: {title}, {done} of {total} {note}", file=sys.stderr, flush=True)

        return report

    return bar


def made(base: common.Subject, cell: Cell, folder: Path) -> dict[str, Any]:
    """Make a cell's model in a folder; returns what is to be told of how."""
    calibration = str(common.DATA / common.CALIBRATION_TEXTS[base.calibration])
    if cell.contender == UNIFORM:
        return _uniform(base, cell, folder)
    effort = "fast" if cell.contender == MIX else cell.contender
    prepared = prepare_recipe(str(base.folder), cell.total, calibration, effort=effort, samples=SAMPLES, seqlen=SEQLEN)
    found = run_recipe(prepared, folder, bar=telling(cell))
    outcome = {} if found.outcome is None else {"refinement": found.outcome.described()}
    widths = [one.bits for one in found.plan.modules.values()]
    return {
        "recipe": {**prepared.record(), "why": prepared.recipe.row.why},
        "planned bytes": found.plan.total_bytes,
        "modules by bits": {str(bits): widths.count(bits) for bits in sorted(set(widths))},
        "predicted": found.plan.predicted_loss,
        **outcome,
    }


def _uniform(base: common.Subject, cell: Cell, folder: Path) -> dict[str, Any]:
    shapes = module_shapes(base)
    total = budget_bytes(cell.total, shapes)
    bits = max(bits for bits in PLANNED_BITS if plain_bytes(shapes, bits, GROUP_SIZE) <= total)
    rank = largest_uniform_rank(total - plain_bytes(shapes, bits, GROUP_SIZE), shapes, FACTOR_BITS)
    tuning = next(row.tuning for row in TABLE if row.effort == "best")
    settings = {"bits": bits, "group_size": GROUP_SIZE, "sym": True, "format": FORMAT, **tuning}
    with quiet():
        quantizer(AUTOROUND)(
            QuantizeJob(
                str(base.folder), folder, common.calibration(base, SAMPLES, SEQLEN), settings,
                {"rank": rank, "factor_bits": FACTOR_BITS} if rank else None, batch_size=AUTOROUND_BATCH,
                report=telling(cell)("quantising layers"),
            )
        )  # fmt: skip
    return {"bits": bits, "rank": rank, "tuning": tuning}


def measure(
    base: common.Subject, cell: Cell, texts: dict[str, torch.Tensor], windows: int, work: Path
) -> dict[str, Any]:
    """Make the model, and evaluate what is stored: refined, and as it was before."""
    folder = place(work, cell, base)
    start = time.perf_counter()
    told = made(base, cell, folder)
    seconds = time.perf_counter() - start
    adapters = [one for name in (DEFAULT_REFINED, DEFAULT_FOLDER) if (one := folder / name).is_dir()]
    compared = [EoRA(path=one) for one in adapters] if adapters else [None]
    with quiet():
        losses = [
            common.losses(common.densified(folder, base, adapter).to(common.device()), texts, windows)
            for adapter in compared
        ]
    nbytes = tensor_bytes(folder, COUNTED) + (tensor_bytes(adapters[0]) if adapters else 0)
    row = {
        **asdict(cell), **told, "seconds of this run": seconds, "bytes": nbytes,
        "bpw": 8 * nbytes / sum(one.weights for one in module_shapes(base)), "loss": losses[0],
        "measured": common.measured(base),
    }  # fmt: skip
    if len(losses) > 1:
        row["loss before refinement"] = losses[1]
    return row


def mixes_of_plan(base: common.Subject, windows: int) -> list[dict[str, Any]]:
    """The planned mixes that `plan.py` has measured on the same windows."""
    found = common.kept(base.results("plan"))
    if not found or found["setup"]["windows"] != windows:
        return []
    names = ("total", "seconds", "bytes", "bpw", "modules by bits", "predicted", "loss", "measured")
    return [
        {"contender": MIX, **{name: run[name] for name in names if name in run}, "taken from": "plan.json"}
        for run in found["runs"] if run["kind"] == MIX
    ]  # fmt: skip


def table_of(runs: list[dict[str, Any]], full: dict[str, float]) -> list[dict[str, Any]]:
    """One row a model: its size, and what it loses on each text."""
    rows = []
    for run in sorted(runs, key=lambda one: (one["total"], CONTENDERS.index(one["contender"]))):
        row = {"total": run["total"], "contender": run["contender"], "bpw": run["bpw"]}
        for text, target in zip(TEXTS, TARGETS.get(run["total"], (None, None)), strict=True):
            lost = run["loss"][text] - full[text]
            before = run.get("loss before refinement")
            row |= {text: lost, f"{text}, not refined": before[text] - full[text] if before else None}
            row[f"{text}, target"] = target if run["contender"] == "best" else None
        rows.append(row)
    return rows


def benchmark(options: argparse.Namespace, base: common.Subject) -> dict[str, Any]:
    """Measure the cells that the results file lacks."""
    setup = {"samples": SAMPLES, "seqlen": SEQLEN, "group_size": GROUP_SIZE, "windows": options.windows}
    path = base.results(options.out)
    previous = common.kept(path, setup)
    runs = previous.get("runs", [])
    texts = {name: ids for name, ids in common.held_out(base).items() if name in TEXTS}
    full = common.full_precision(previous, base, texts, options.windows, common.device())
    wanted = [Cell(total, contender) for contender in options.contenders for total in options.totals]
    known = {cell_of(run): run for run in mixes_of_plan(base, options.windows)} if MIX in options.contenders else {}
    for cell in wanted:
        if cell in map(cell_of, runs):
            continue
        runs.append(known[cell] if cell in known else measure(base, cell, texts, options.windows, options.work))
        common.keep(path, {"setup": setup, **full, "runs": runs, "losses": table_of(runs, full["full"])})
        if not options.keep:
            shutil.rmtree(place(options.work, cell, base), ignore_errors=True)
    return common.kept(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--totals", nargs="+", default=list(TARGETS))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS[:3]), choices=[*EFFORTS, UNIFORM, MIX])
    parser.add_argument("--windows", type=int, default=24, help="held-out windows of 512 tokens per text")
    parser.add_argument("--work", type=Path, default=cache_folder() / "benchmark-recipes", help="for checkpoints")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--out", default="recipes", help="name of the results file")
    common.add_model(parser)
    options = parser.parse_args()
    with common.subject(options) as base:
        result = benchmark(options, base)
    if options.json:
        print(json.dumps(result, indent=2))
    if result.get("losses"):
        common.table(list(result["losses"][0]), [["" if one is None else one for one in row.values()]
                                                  for row in result["losses"]])  # fmt: skip


if __name__ == "__main__":
    main()
