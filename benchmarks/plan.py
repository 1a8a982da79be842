"""Do planned mixes of bits and ranks beat uniform choices of their size, and do predictions rank what is measured?

Cells are plain models, one rank for all at the largest size below each total, chosen ranks there, and `eora plan`'s
mixes. All are quantised with the same search for scales. Loss is measured on held-out text. A GPU is used where there
is one; `CUDA_VISIBLE_DEVICES=` names it, or none. Results are kept after every cell; cells may be measured by several
processes, each with its own file, and merged:

    python benchmarks/plan.py --list
    python benchmarks/plan.py --shard 0/4 --out part0.json
    python benchmarks/plan.py --cells mix --totals 2.5bpw 3.0bpw --out mixes.json
    python benchmarks/plan.py --cells mix uniform --factor-bits 4 --totals 4.5bpw --out larger.json
    python benchmarks/plan.py --model qwen-coder --quantized-layers 10 --totals 2.75bpw --windows 8
    python benchmarks/plan.py --merge part*.json mixes.json larger.json --json

Weights of SmolLM2 and of Qwen2.5-Coder had 4 bits before they were dequantised, so what modules of 4 bits lose says
little about an original model. Tables and results mark such cells.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import common
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import AdapterCache

from gptqmodel_eora_ext import EoRA, Plan
from gptqmodel_eora_ext.adapter.budget import budget_bytes, largest_uniform_rank
from gptqmodel_eora_ext.formats.sizes import ModuleShape, weight_bytes
from gptqmodel_eora_ext.hosts.gptqmodel.modules import module_shapes
from gptqmodel_eora_ext.hosts.gptqmodel.survey import survey_model
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.plan import (
    PlannedModule,
    largest_rank,
    plan_points,
    plan_question,
    planned,
    planned_modules,
    sweep_rank,
)
from gptqmodel_eora_ext.plan.modules import plain_bytes
from gptqmodel_eora_ext.solve import Grid

# As in `recovery.py`, but with the search for scales at every width, so that widths compare.
SAMPLES, SEQLEN = 32, 256
GRID = Grid(group_size=64, sym=True, scale_search=2.4)
PLAIN_BITS = (2, 3, 4)
FACTOR_BITS = (16, 8, 4)
CHOSEN_FACTOR_BITS = 4
TOTALS = ("2.5bpw", "2.75bpw", "3.0bpw", "3.25bpw")
# Beyond plain 3 bits, for the Pareto table alone.
LARGER_TOTALS = ("3.5bpw", "3.75bpw")
KINDS = ("plain", "uniform", "auto", "mix")
# Column that marks cells whose widest modules have as many bits as the weights had before.
HAD_BITS = "had these bits"


@dataclass(frozen=True)
class Cell:
    """One model. kind: "plain", "uniform" (one rank), "auto" (chosen ranks) or "mix" (bits and ranks chosen)."""

    kind: str
    bits: int
    factor_bits: int = 0
    total: str = ""

    def __str__(self) -> str:
        weights = f"{self.bits} bits" if self.bits else "mixed bits"
        adapter = f", {self.kind} ranks in {self.factor_bits} bits up to {self.total}" if self.total else ""
        return f"{weights}{adapter}"


@functools.cache
def loaded(base: common.Subject) -> tuple[Any, list[ModuleShape]]:
    with quiet():
        config = QuantizeConfig(bits=PLAIN_BITS[0], group_size=GRID.group_size, dynamic=base.dynamic())
        host = GPTQModel.load(str(base.folder), config)
    return host, module_shapes(host)


@functools.cache
def forecasts(base: common.Subject) -> list[PlannedModule]:
    """As `eora plan` makes them, once a process; sensitivities come from the cache where they are there."""
    host, shapes = loaded(base)
    budgets = [f"{size}b" for total in (*TOTALS, *LARGER_TOTALS) if (size := room(base, total, 2)) > 0]
    total = budget_bytes(LARGER_TOTALS[-1], shapes)
    most = max(
        sweep_rank(shapes, budgets, FACTOR_BITS),
        largest_rank(shapes, total, PLAIN_BITS[0], GRID.group_size, CHOSEN_FACTOR_BITS),
    )
    question = plan_question(shapes, GRID, most=most)
    with quiet():
        found = survey_model(host, shapes, common.calibration(base, SAMPLES, SEQLEN), question, kind="fisher")
    return planned_modules(shapes, found)


def room(base: common.Subject, total: str, bits: int) -> int:
    """Bytes that a total leaves for factors."""
    shapes = loaded(base)[1]
    return budget_bytes(total, shapes) - plain_bytes(shapes, bits, GRID.group_size)


def cells(base: common.Subject, kinds: list[str], totals: list[str], widths: list[int]) -> list[Cell]:
    """The cells of some kinds, totals too small for an adapter left out."""
    found = [Cell("plain", bits) for bits in PLAIN_BITS]
    for total in totals:
        smaller = [bits for bits in PLAIN_BITS if rank_of(base, Cell("uniform", bits, CHOSEN_FACTOR_BITS, total))]
        found.append(Cell("mix", 0, CHOSEN_FACTOR_BITS, total))
        found += [Cell("auto", bits, CHOSEN_FACTOR_BITS, total) for bits in smaller]
        found += [Cell("uniform", bits, width, total) for bits in smaller for width in widths]
    return [cell for cell in found if cell.kind in kinds]


def rank_of(base: common.Subject, cell: Cell) -> int:
    """The largest rank for all within a cell's total; 0 where none fits."""
    return largest_uniform_rank(room(base, cell.total, cell.bits), loaded(base)[1], cell.factor_bits)


def plan_of(base: common.Subject, cell: Cell) -> Plan:
    total = budget_bytes(cell.total, loaded(base)[1])
    return planned(forecasts(base), total, GRID, cell.factor_bits, model=base.name, sensitivity="fisher")


def predicted(base: common.Subject, cell: Cell) -> float:
    """Loss above that of the full-precision model."""
    if cell.kind == "mix":
        return plan_of(base, cell).predicted_loss
    if cell.kind == "auto":
        budget = f"{room(base, cell.total, cell.bits)}b"
        points = plan_points(
            forecasts(base), GRID, bits=cell.bits, factor_bits=(cell.factor_bits,), budgets=(budget,), with_mixes=False
        )
        return next(point.loss for point in points if point.ranks == "auto")
    rank = rank_of(base, cell) if cell.total else 0
    return sum(module.loss(cell.bits, rank, cell.factor_bits or 16) for module in forecasts(base))


def setup_of(base: common.Subject, cell: Cell) -> tuple[dict[str, Any], EoRA | None]:
    """What GPTQModel is given: config and adapter."""
    config = {"bits": cell.bits, "group_size": GRID.group_size, "sym": GRID.sym, "mse": GRID.scale_search}
    if cell.kind == "plain":
        return config, None
    if cell.kind == "uniform":
        return config, EoRA(rank=rank_of(base, cell), factor_bits=cell.factor_bits)
    if cell.kind == "auto":
        return config, EoRA("auto", budget=room(base, cell.total, cell.bits), factor_bits=cell.factor_bits)
    plan = plan_of(base, cell)
    return plan.quantize_config(), EoRA(plan=plan) if plan.largest_rank else None


def measure(base: common.Subject, cell: Cell, texts: dict[str, torch.Tensor], windows: int) -> dict[str, Any]:
    """Quantise, save, load, evaluate."""
    expected = predicted(base, cell)
    settings, adapter = setup_of(base, cell)
    shapes = loaded(base)[1]
    with common.scratch() as folder, quiet():
        AdapterCache.reset()
        dynamic = {**(base.dynamic() or {}), **settings.pop("dynamic", {})}
        config = QuantizeConfig(**settings, dynamic=dynamic or None)
        model = GPTQModel.load(str(base.folder), config)
        calibration = common.calibration(base, SAMPLES, SEQLEN)
        start = time.perf_counter()
        model.quantize(calibration, batch_size=common.BATCH_SIZE, adapter=adapter)
        seconds = time.perf_counter() - start
        model.save(str(folder / "model"))
        widths = {shape.name: config.dynamic_get(shape.name, "bits", config.bits) for shape in shapes}
        del model
        details = folder / "model" / "eora" / "eora.json"
        reports = json.loads(details.read_text())["modules"] if adapter is not None else {}
        dense = common.densified(folder / "model", base).to(common.device())
        losses = common.losses(dense, texts, windows)
    factors = sum(report["bytes"] for report in reports.values())
    stored = sum(weight_bytes(shape, widths[shape.name], GRID.group_size) for shape in shapes)
    return {
        **asdict(cell),
        "seconds": seconds,
        "adapter bytes": factors,
        "bytes": stored + factors,
        "bpw": 8 * (stored + factors) / sum(shape.weights for shape in shapes),
        "modules by bits": {str(bits): count for bits, count in sorted(Counter(widths.values()).items())},
        "predicted": expected,
        "loss": losses,
        "measured": common.measured(base),
    }


def cell_of(run: dict[str, Any]) -> Cell:
    return Cell(**{one.name: run[one.name] for one in fields(Cell)})


def agreement(runs: list[dict[str, Any]], full: dict[str, float]) -> dict[str, Any]:
    """Rank correlation (Spearman) of predicted with measured loss, and the range of measured over predicted."""
    if len(runs) < 3:
        return {}
    predictions = [run["predicted"] for run in runs]
    found: dict[str, Any] = {"cells": len(runs)}
    for text in common.common_texts(full, *(run["loss"] for run in runs)):
        lost = [run["loss"][text] - full[text] for run in runs]
        ratios = [one / prediction for one, prediction in zip(lost, predictions, strict=True)]
        found[text] = {
            "rank correlation": common.rank_correlation(predictions, lost),
            "measured / predicted": [min(ratios), statistics.median(ratios), max(ratios)],
        }
    return found


def mixes(base: common.Subject, runs: list[dict[str, Any]], full: dict[str, float]) -> list[dict[str, Any]]:
    """One row a mix and text: its loss beside the best uniform choice of at most its total."""
    rows = []
    for run in runs:
        if run["kind"] != "mix":
            continue
        allowed = budget_bytes(run["total"], loaded(base)[1])
        others = [one for one in runs if one["kind"] in ("plain", "uniform") and one["bytes"] <= allowed]
        for text in common.common_texts(full, run["loss"], *(one["loss"] for one in others)) if others else ():
            best = min(others, key=lambda one: one["loss"][text])
            named = (("mix", run), ("uniform", best))
            rows.append(
                {
                    "total": run["total"],
                    "bpw": run["bpw"],
                    "text": text,
                    "mix": run["loss"][text] - full[text],
                    "uniform choices": len(others),
                    "best uniform": str(cell_of(best)),
                    "its bpw": best["bpw"],
                    "its loss": best["loss"][text] - full[text],
                    "no worse": run["loss"][text] <= best["loss"][text],
                    HAD_BITS: " and ".join(kind for kind, one in named if marked(base, one)),
                }
            )
    return rows


def marked(base: common.Subject, run: dict[str, Any]) -> bool:
    """Whether a cell has modules of as many bits as the weights had before. Runs that do not tell the widths of their
    modules are marked where they are mixes, since any of those may."""
    widths = map(int, run.get("modules by bits", [run["bits"] or max(PLAIN_BITS)]))
    return base.bits is not None and max(widths) >= base.bits


def pareto(base: common.Subject, runs: list[dict[str, Any]], full: dict[str, float]) -> list[dict[str, Any]]:
    """All cells by size: kept by the prediction (no other is smaller and predicted better), and so when measured."""
    texts = common.common_texts(full, *(run["loss"] for run in runs))
    rows = []
    for run in runs:
        row = {"cell": str(cell_of(run)), "bytes": run["bytes"], "bpw": run["bpw"], "predicted": run["predicted"]}
        measured = {text: run["loss"][text] - full[text] for text in texts}
        mean = sum(measured.values()) / len(measured)
        rows.append({**row, **measured, "mean": mean, HAD_BITS: "yes" if marked(base, run) else ""})
    for row in rows:
        for key, name in (("predicted", "kept"), ("mean", "undominated")):
            row[name] = not any(
                other["bytes"] <= row["bytes"] and other[key] <= row[key] and other is not row for other in rows
            )
    return sorted(rows, key=lambda row: row["bytes"])


def result_of(
    base: common.Subject, setup: dict[str, Any], full: dict[str, Any], runs: list[dict[str, Any]]
) -> dict[str, Any]:
    losses = full["full"]
    return {
        "setup": setup,
        "note": note(base),
        **full,
        "runs": runs,
        "agreement": agreement(runs, losses),
        "mixes": mixes(base, runs, losses),
        "pareto": pareto(base, runs, losses),
    }


def note(base: common.Subject) -> str:
    """What has to stand beside figures of wide modules."""
    if base.bits is None:
        return ""
    return (
        f"The weights of {base.name} had {base.bits} bits already. Where modules of {base.bits} bits take part (column "
        f'"{HAD_BITS}"), losses are not those that {base.bits} bits cost original weights.'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--cells", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--totals", nargs="+", default=[*TOTALS, *LARGER_TOTALS])
    parser.add_argument("--factor-bits", nargs="+", type=int, default=FACTOR_BITS[::-1], choices=FACTOR_BITS,
                        help="of uniform ranks")  # fmt: skip
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th cell, from the i-th on")
    parser.add_argument("--list", action="store_true", help="list the cells, with their predictions, and measure none")
    parser.add_argument("--windows", type=int, default=24, help="held-out windows of 512 tokens per text")
    parser.add_argument("--out", type=Path, help="the results file, in place of the model's own in results/")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], help="take the runs of these files as well")
    common.add_model(parser, quantized_layers=True)
    options = parser.parse_args()
    with common.subject(options) as base:
        first, step = map(int, options.shard.split("/"))
        wanted = cells(base, options.cells, options.totals, options.factor_bits)[first::step]
        if options.list:
            for cell in wanted:
                print(f"{predicted(base, cell):.4f}  {cell}")
            return
        result = benchmark(options, base, [] if options.merge else wanted)
    for rows in (result["mixes"], result["pareto"]):
        if rows:
            common.table(list(rows[0]), [list(row.values()) for row in rows])
    print(json.dumps(result["agreement"], indent=2))
    print(result["note"])


def benchmark(options: argparse.Namespace, base: common.Subject, wanted: list[Cell]) -> dict[str, Any]:
    """Measure the cells that no file holds yet."""
    setup = {"samples": SAMPLES, "seqlen": SEQLEN, "grid": asdict(GRID), "windows": options.windows}
    path = options.out or base.results("plan")
    known: dict[Cell, dict[str, Any]] = {}
    full: dict[str, Any] = {}
    for one in [path, *options.merge]:
        previous = common.kept(one, setup)
        full = full or previous
        known |= {cell_of(run): run for run in previous.get("runs", [])}
    texts = common.held_out(base)
    full = common.full_precision(full, base, texts, options.windows, common.device())
    for cell in wanted:
        if cell not in known:
            known[cell] = measure(base, cell, texts, options.windows)
            common.keep(path, result_of(base, setup, full, list(known.values())))
    result = result_of(base, setup, full, list(known.values()))
    common.keep(path, result, as_json=options.json)
    return result


if __name__ == "__main__":
    main()
