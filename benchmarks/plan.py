"""Do planned mixes of bits and ranks beat uniform choices of their size, and do predictions rank what is measured?

Cells are plain models, one rank for all at the largest size below each total, chosen ranks there, and `eora plan`'s
mixes. All are quantised with the same search for scales. Loss is measured on held-out text. A GPU is used where there
is one; `CUDA_VISIBLE_DEVICES=` names it, or none. Results are kept after every cell; cells may be measured by several
processes, each with its own file, and merged:

    python benchmarks/plan.py --list
    python benchmarks/plan.py --shard 0/4 --out part0.json
    python benchmarks/plan.py --cells mix --totals 2.5bpw 3.0bpw --out mixes.json
    python benchmarks/plan.py --cells mix uniform --factor-bits 4 --totals 4.5bpw --out larger.json
    python benchmarks/plan.py --merge part*.json mixes.json larger.json --json
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import common
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import AdapterCache

from gptqmodel_eora_ext import EoRA, Plan
from gptqmodel_eora_ext.budget import ModuleShape, budget_bytes, uniform_rank, weight_bytes
from gptqmodel_eora_ext.hosts.gptqmodel.auto import module_shapes, survey
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.plan import PlannedModule, forecast_modules, largest_rank, plan_points, planned, sweep_rank
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
def base() -> tuple[Any, list[ModuleShape]]:
    with quiet():
        host = GPTQModel.load(str(common.smollm2()), QuantizeConfig(bits=PLAIN_BITS[0], group_size=GRID.group_size))
    return host, module_shapes(host)


@functools.cache
def forecasts() -> list[PlannedModule]:
    """As `eora plan` makes them, once a process; sensitivities come from the cache where they are there."""
    host, shapes = base()
    with quiet():
        linears, sensitivity = survey(host, shapes, common.calibration(SAMPLES, SEQLEN), kind="fisher")
    budgets = [f"{size}b" for total in (*TOTALS, *LARGER_TOTALS) if (size := room(total, 2)) > 0]
    total = budget_bytes(LARGER_TOTALS[-1], shapes)
    most = max(
        sweep_rank(shapes, budgets, FACTOR_BITS),
        largest_rank(shapes, total, PLAIN_BITS[0], GRID.group_size, CHOSEN_FACTOR_BITS),
    )
    weights = {name: linear.weight.data for name, linear in linears.items()}
    return forecast_modules(shapes, weights, sensitivity, GRID, most=most)


def room(total: str, bits: int) -> int:
    """Bytes that a total leaves for factors."""
    shapes = base()[1]
    return budget_bytes(total, shapes) - plain_bytes(shapes, bits, GRID.group_size)


def cells(kinds: list[str], totals: list[str], widths: list[int]) -> list[Cell]:
    """The cells of some kinds, totals too small for an adapter left out."""
    found = [Cell("plain", bits) for bits in PLAIN_BITS]
    for total in totals:
        smaller = [bits for bits in PLAIN_BITS if rank_of(Cell("uniform", bits, CHOSEN_FACTOR_BITS, total))]
        found.append(Cell("mix", 0, CHOSEN_FACTOR_BITS, total))
        found += [Cell("auto", bits, CHOSEN_FACTOR_BITS, total) for bits in smaller]
        found += [Cell("uniform", bits, width, total) for bits in smaller for width in widths]
    return [cell for cell in found if cell.kind in kinds]


def rank_of(cell: Cell) -> int:
    """The largest rank for all within a cell's total; 0 where none fits."""
    return uniform_rank(room(cell.total, cell.bits), base()[1], cell.factor_bits)


def plan_of(cell: Cell) -> Plan:
    total = budget_bytes(cell.total, base()[1])
    return planned(forecasts(), total, GRID, cell.factor_bits, model=common.SMOLLM2.name, sensitivity="fisher")


def predicted(cell: Cell) -> float:
    """Loss above that of the full-precision model."""
    if cell.kind == "mix":
        return plan_of(cell).predicted_loss
    if cell.kind == "auto":
        budget = f"{room(cell.total, cell.bits)}b"
        points = plan_points(
            forecasts(), GRID, bits=cell.bits, factor_bits=(cell.factor_bits,), budgets=(budget,), with_mixes=False
        )
        return next(point.loss for point in points if point.ranks == "auto")
    rank = rank_of(cell) if cell.total else 0
    return sum(module.loss(cell.bits, rank, cell.factor_bits or 16) for module in forecasts())


def setup_of(cell: Cell) -> tuple[dict[str, Any], EoRA | None]:
    """What GPTQModel is given: config and adapter."""
    config = {"bits": cell.bits, "group_size": GRID.group_size, "sym": GRID.sym, "mse": GRID.scale_search}
    if cell.kind == "plain":
        return config, None
    if cell.kind == "uniform":
        return config, EoRA(rank=rank_of(cell), factor_bits=cell.factor_bits)
    if cell.kind == "auto":
        return config, EoRA("auto", budget=room(cell.total, cell.bits), factor_bits=cell.factor_bits)
    plan = plan_of(cell)
    return plan.quantize_config(), EoRA(plan=plan) if plan.largest_rank else None


def measure(cell: Cell, texts: dict[str, torch.Tensor], windows: int) -> dict[str, Any]:
    """Quantise, save, load, evaluate."""
    expected = predicted(cell)
    settings, adapter = setup_of(cell)
    with common.scratch() as folder, quiet():
        AdapterCache.reset()
        config = QuantizeConfig(**settings)
        model = GPTQModel.load(str(common.smollm2()), config)
        start = time.perf_counter()
        model.quantize(common.calibration(SAMPLES, SEQLEN), batch_size=common.BATCH_SIZE, adapter=adapter)
        seconds = time.perf_counter() - start
        model.save(str(folder / "model"))
        widths = {shape.name: config.dynamic_get(shape.name, "bits", config.bits) for shape in base()[1]}
        del model
        details = folder / "model" / "eora" / "eora.json"
        reports = json.loads(details.read_text())["modules"] if adapter is not None else {}
        dense = common.densified(folder / "model").to(common.device())
        losses = common.losses(dense, texts, windows)
    factors = sum(report["bytes"] for report in reports.values())
    stored = sum(weight_bytes(shape, widths[shape.name], GRID.group_size) for shape in base()[1])
    return {
        **asdict(cell),
        "seconds": seconds,
        "adapter bytes": factors,
        "bytes": stored + factors,
        "bpw": 8 * (stored + factors) / sum(shape.weights for shape in base()[1]),
        "predicted": expected,
        "loss": losses,
    }


def cell_of(run: dict[str, Any]) -> Cell:
    return Cell(**{one.name: run[one.name] for one in fields(Cell)})


def agreement(runs: list[dict[str, Any]], full: dict[str, float]) -> dict[str, Any]:
    """Rank correlation (Spearman) of predicted with measured loss, and the range of measured over predicted."""
    if len(runs) < 3:
        return {}
    predictions = [run["predicted"] for run in runs]
    found: dict[str, Any] = {"cells": len(runs)}
    for text in full:
        lost = [run["loss"][text] - full[text] for run in runs]
        ratios = [one / prediction for one, prediction in zip(lost, predictions, strict=True)]
        found[text] = {
            "rank correlation": common.rank_correlation(predictions, lost),
            "measured / predicted": [min(ratios), statistics.median(ratios), max(ratios)],
        }
    return found


def mixes(runs: list[dict[str, Any]], full: dict[str, float]) -> list[dict[str, Any]]:
    """One row a mix and text: its loss beside the best uniform choice of at most its total."""
    rows = []
    for run in runs:
        if run["kind"] != "mix":
            continue
        allowed = budget_bytes(run["total"], base()[1])
        others = [one for one in runs if one["kind"] in ("plain", "uniform") and one["bytes"] <= allowed]
        for text in full if others else ():
            best = min(others, key=lambda one: one["loss"][text])
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
                }
            )
    return rows


def pareto(runs: list[dict[str, Any]], full: dict[str, float]) -> list[dict[str, Any]]:
    """All cells by size: kept by the prediction (no other is smaller and predicted better), and so when measured."""
    rows = []
    for run in runs:
        row = {"cell": str(cell_of(run)), "bytes": run["bytes"], "bpw": run["bpw"], "predicted": run["predicted"]}
        measured = {text: run["loss"][text] - full[text] for text in full}
        rows.append({**row, **measured, "mean": sum(measured.values()) / len(measured)})
    for row in rows:
        for key, name in (("predicted", "kept"), ("mean", "undominated")):
            row[name] = not any(
                other["bytes"] <= row["bytes"] and other[key] <= row[key] and other is not row for other in rows
            )
    return sorted(rows, key=lambda row: row["bytes"])


def write(path: Path, runs: list[dict[str, Any]], full: dict[str, float], windows: int) -> dict[str, Any]:
    setup = {"samples": SAMPLES, "seqlen": SEQLEN, "grid": asdict(GRID), "windows": windows, "device": common.device()}
    result = {
        "environment": common.environment(),
        "setup": setup,
        "full": full,
        "runs": runs,
        "agreement": agreement(runs, full),
        "mixes": mixes(runs, full),
        "pareto": pareto(runs, full),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return result


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
    parser.add_argument("--out", type=Path, default=common.RESULTS / "plan.json")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], help="take the runs of these files as well")
    options = parser.parse_args()

    first, step = map(int, options.shard.split("/"))
    wanted = cells(options.cells, options.totals, options.factor_bits)[first::step]
    if options.list:
        for cell in wanted:
            print(f"{predicted(cell):.4f}  {cell}")
        return
    known: dict[Cell, dict[str, Any]] = {}
    full: dict[str, float] = {}
    for path in [options.out, *options.merge]:
        if path.is_file():
            previous = json.loads(path.read_text())
            full = full or previous["full"]
            known |= {cell_of(run): run for run in previous["runs"]}
    texts = common.held_out()
    full = full or common.losses(common.base_model().to(common.device()), texts, options.windows)
    result = write(options.out, list(known.values()), full, options.windows)
    for cell in [] if options.merge else wanted:
        if cell not in known:
            known[cell] = measure(cell, texts, options.windows)
            result = write(options.out, list(known.values()), full, options.windows)
    if options.json:
        print(json.dumps(result, indent=2))
    for rows in (result["mixes"], result["pareto"]):
        if rows:
            common.table(list(rows[0]), [list(row.values()) for row in rows])
    print(json.dumps(result["agreement"], indent=2))


if __name__ == "__main__":
    main()
