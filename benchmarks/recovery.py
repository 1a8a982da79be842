"""How much of the loss that quantisation costs does an adapter win back, against GPTQModel's own `Lora`?

Recovered share = (loss_q − loss_adapter) / (loss_q − loss_full), loss in nats per token on held-out text. Same model,
calibration, rank and process for both. At 2 bits also: factors in 8 and 4 bits, at the bytes of a 16-bit rank 32.
Under budgets in bits per quantised weight (bpw): 4-bit factors with ranks chosen by the loss they save, against one
rank for all in 4 bits, in 16 bits, and against stock's, the last two at no fewer bytes. Results are kept after every
run, so that an interrupted benchmark goes on.

    python benchmarks/recovery.py --json
    python benchmarks/recovery.py --parts budgets --bits 2 --budgets 0.5bpw
    python benchmarks/recovery.py --model qwen-coder --quantized-layers 10 --parts budgets --bits 2 --windows 8 \\
        --budgets 0.25bpw 0.5bpw --contenders balanced uniform uniform16
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import common
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import AdapterCache, Lora

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.adapter.budget import budget_bytes, largest_uniform_rank
from gptqmodel_eora_ext.adapter.presets import PRESETS
from gptqmodel_eora_ext.adapter.vocabulary import SENSITIVITIES
from gptqmodel_eora_ext.formats.factors import GROUP_SIZE as FACTOR_GROUP_SIZE
from gptqmodel_eora_ext.formats.sizes import ModuleShape, factor_bytes
from gptqmodel_eora_ext.hosts.terminal import quiet

# 8k tokens: a run takes minutes on two cores, and every cell of both contenders sees the same tokens.
SAMPLES, SEQLEN = 32, 256
GROUP_SIZE = 64
# GPTQModel's search for scales (`mse`), by bits. With it off, 2 bits g64 leaves SmolLM2 at a loss above that of a
# uniform guess (11.3 nats against 10.8), where a share of what was lost says nothing. At 3 bits it is not needed.
SCALE_SEARCH = {2: 2.4, 3: 0.0}
# Packed factors are compared at the bytes of this rank in 16 bits, on a model of these bits.
PACKED_AGAINST_RANK, PACKED_BITS = 32, 2
SCALE_BITS = 16
BUDGET_FACTOR_BITS = 4
BUDGETS = ("0.25bpw", "0.5bpw", "1.0bpw")
PARTS = ("ranks", "packed", "budgets")
# Presets, and one rank for all: our 4-bit factors, our 16-bit ones, and stock's.
UNIFORM = ("uniform", "uniform16", "stock")
CONTENDERS = ("balanced", "best", *UNIFORM)


@dataclass(frozen=True)
class Cell:
    """One run. kind: "none", "stock", "ours", or "auto" for ranks under a budget by some sensitivity."""

    kind: str
    bits: int
    rank: int = 0
    factor_bits: int = 16
    budget: str | None = None
    sensitivity: str | None = None
    rounds: int = 1

    def adapter(self, folder: Path) -> Any:
        if self.kind == "none":
            return None
        if self.kind == "stock":
            return Lora(rank=self.rank, path=str(folder / "lora"))
        if self.kind == "auto":
            return EoRA(
                budget=self.budget, sensitivity=self.sensitivity, factor_bits=self.factor_bits, rounds=self.rounds
            )
        return EoRA(rank=self.rank, factor_bits=self.factor_bits)


def rank_of_same_bytes(factor_bits: int) -> int:
    """The largest rank whose packed factors, scales included, take no more than 16-bit ones of the reference rank."""
    return int(PACKED_AGAINST_RANK * 16 / (factor_bits + SCALE_BITS / FACTOR_GROUP_SIZE))


def cell_of(run: dict[str, Any]) -> Cell:
    return Cell(**{one.name: run[one.name] for one in fields(Cell) if one.name in run})


@functools.cache
def module_shapes(base: common.Subject) -> list[ModuleShape]:
    """The modules that share a budget."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.folder))
    return [
        ModuleShape(name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings() and base.quantizes(name)
    ]


def budget_cells(base: common.Subject, bits: int, budget: str) -> dict[str, Cell]:
    """The presets "balanced" and "best", one rank for all within the same bytes, and 16-bit ones at no fewer bytes."""
    shapes = module_shapes(base)
    allowed = budget_bytes(budget, shapes)
    uniform = largest_uniform_rank(allowed, shapes, BUDGET_FACTOR_BITS)
    rank_of_16_bits = -int(-allowed // sum(factor_bytes(1, shape, 16) for shape in shapes))
    chosen = Cell("auto", bits, factor_bits=BUDGET_FACTOR_BITS, budget=budget, sensitivity="fisher")
    return {
        "balanced": chosen,
        "best": replace(chosen, rounds=PRESETS["best"].rounds),
        "uniform": Cell("ours", bits, uniform, BUDGET_FACTOR_BITS),
        "uniform16": Cell("ours", bits, rank_of_16_bits),
        "stock": Cell("stock", bits, rank_of_16_bits),
    }


def measure(base: common.Subject, cell: Cell, texts: dict[str, Any], windows: int) -> dict[str, Any]:
    """Quantise, save, load, evaluate."""
    with common.scratch() as folder, quiet():
        adapter = cell.adapter(folder)
        AdapterCache.reset()
        config = QuantizeConfig(
            bits=cell.bits, group_size=GROUP_SIZE, mse=SCALE_SEARCH[cell.bits], dynamic=base.dynamic()
        )
        model = GPTQModel.load(str(base.folder), config)
        calibration = common.calibration(base, SAMPLES, SEQLEN)
        start = time.perf_counter()
        model.quantize(calibration, batch_size=common.BATCH_SIZE, adapter=adapter)
        seconds = time.perf_counter() - start
        model.save(str(folder / "model"))
        del model
        adapter_file = folder / "model" / "eora" / "adapter_model.safetensors"
        adapter_bytes = adapter_file.stat().st_size if isinstance(adapter, EoRA) else None
        reload = Lora(rank=cell.rank, path=str(folder / "lora")) if cell.kind == "stock" else None
        losses = common.losses(common.densified(folder / "model", base, reload).to(common.device()), texts, windows)
    return {
        **asdict(cell),
        "seconds": seconds,
        "adapter bytes": adapter_bytes,
        "loss": losses,
        "measured": common.measured(base),
    }


def shares(runs: list[dict[str, Any]], full: dict[str, float]) -> list[dict[str, Any]]:
    """One row a cell: recovered shares of both contenders."""
    found = {cell_of(run): run["loss"] for run in runs}
    rows = []
    for cell, ours in found.items():
        bits, rank = cell.bits, cell.rank
        against = Cell("stock", bits, rank)
        if cell != Cell("ours", bits, rank) or against not in found:
            continue
        plain, stock = found[Cell("none", bits)], found[against]
        for text in common.common_texts(ours, stock, plain, full):
            lost = plain[text] - full[text]
            rows.append(
                {
                    "bits": bits,
                    "rank": rank,
                    "text": text,
                    "full": full[text],
                    "quantised": plain[text],
                    "stock": stock[text],
                    "ours": ours[text],
                    "stock share": (plain[text] - stock[text]) / lost,
                    "our share": (plain[text] - ours[text]) / lost,
                }
            )
    return rows


def packed_shares(runs: list[dict[str, Any]], full: dict[str, float]) -> list[dict[str, Any]]:
    """One row a text and width of factors, at the same bytes: recovered share, and its ratio to 16 bits."""
    found = {cell_of(run): run for run in runs}
    packed = [(bits, rank_of_same_bytes(bits)) for bits in (8, 4)]
    reference = found.get(Cell("ours", PACKED_BITS, PACKED_AGAINST_RANK))
    if reference is None:
        return []
    plain = found[Cell("none", PACKED_BITS)]["loss"]
    rows = []
    for factor_bits, rank in [(16, PACKED_AGAINST_RANK), *packed]:
        run = found.get(Cell("ours", PACKED_BITS, rank, factor_bits))
        for text in common.common_texts(plain, run["loss"], reference["loss"], full) if run else ():
            rows.append(
                {
                    "factor_bits": factor_bits,
                    "rank": rank,
                    "adapter bytes": run.get("adapter bytes"),
                    "text": text,
                    "share": (plain[text] - run["loss"][text]) / (plain[text] - full[text]),
                    "ratio": (plain[text] - run["loss"][text]) / (plain[text] - reference["loss"][text]),
                }
            )
    return rows


def budget_shares(base: common.Subject, runs: list[dict[str, Any]], full: dict[str, float]) -> list[dict[str, Any]]:
    """One row a budget and text: recovered shares, and how many times that of one rank for all and of stock."""
    found = {cell_of(run): run for run in runs}
    rows = []
    for cell, run in found.items():
        if cell.kind != "auto" or cell.budget is None:
            continue
        others = budget_cells(base, cell.bits, cell.budget)
        plain = found.get(Cell("none", cell.bits))
        for text in common.common_texts(run["loss"], plain["loss"], full) if plain else ():
            lost = plain["loss"][text] - full[text]
            share, *compared = (
                (plain["loss"][text] - found[one]["loss"][text]) / lost
                if one in found and text in found[one]["loss"]
                else math.nan
                for one in (cell, *(others[name] for name in UNIFORM))
            )
            rows.append(
                {
                    "bits": cell.bits,
                    "budget": cell.budget,
                    "sensitivity": cell.sensitivity,
                    "rounds": cell.rounds,
                    "adapter bytes": run["adapter bytes"],
                    "seconds": run["seconds"],
                    "text": text,
                    "share": share,
                    **{f"{name} share": other for name, other in zip(UNIFORM, compared, strict=True)},
                    **{f"share / {name}": share / other for name, other in zip(UNIFORM, compared, strict=True)},
                }
            )
    return sorted(rows, key=lambda row: (row["rounds"], row["sensitivity"], row["bits"], row["budget"], row["text"]))


def wanted(options: argparse.Namespace, base: common.Subject) -> list[Cell]:
    """The cells that the command line asks for."""
    found = [Cell("none", bits) for bits in options.bits]
    if "ranks" in options.parts:
        found += [Cell(kind, bits, rank) for bits in options.bits for rank in options.ranks
                  for kind in ("stock", "ours")]  # fmt: skip
    if "packed" in options.parts and PACKED_BITS in options.bits:
        found += [Cell("ours", PACKED_BITS, rank_of_same_bytes(bits), bits) for bits in (8, 4)]
    if "budgets" in options.parts:
        for bits, budget in itertools.product(options.bits, options.budgets):
            cells = budget_cells(base, bits, budget)
            found += [cells[name] for name in options.contenders if name != "balanced"]
            if "balanced" in options.contenders:
                found += [replace(cells["balanced"], sensitivity=sensitivity) for sensitivity in options.sensitivities]
    first, step = map(int, options.shard.split("/"))
    return found[first::step]


def benchmark(options: argparse.Namespace, base: common.Subject) -> dict[str, Any]:
    """Measure the cells that the results file lacks."""
    setup = {"samples": SAMPLES, "seqlen": SEQLEN, "group_size": GROUP_SIZE, "mse": SCALE_SEARCH,
             "windows": options.windows}  # fmt: skip
    path = base.results(options.out or "recovery")
    previous = {} if options.fresh else common.kept(path, setup)
    for name in options.merge:
        part = common.kept(base.results(name), setup)
        previous = {**part, "runs": [*previous.get("runs", []), *part["runs"]]}
    runs = list({cell_of(run): run for run in previous.get("runs", [])}.values())
    texts = common.held_out(base)
    full = common.full_precision(previous, base, texts, options.windows, common.device())

    def result() -> dict[str, Any]:
        losses = full["full"]
        return {"setup": setup, **full, "runs": runs, "shares": shares(runs, losses),
                "same bytes": packed_shares(runs, losses), "budgets": budget_shares(base, runs, losses)}  # fmt: skip

    for cell in [] if options.merge else wanted(options, base):
        if cell not in map(cell_of, runs):
            runs.append(measure(base, cell, texts, options.windows))
            common.keep(path, result())
    common.keep(path, result(), as_json=options.json)
    return result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--sensitivities", nargs="+", default=["fisher"], choices=SENSITIVITIES)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--windows", type=int, default=24, help="held-out windows of 512 tokens per text")
    parser.add_argument("--fresh", action="store_true", help="measure again what the results file already holds")
    parser.add_argument("--out", help="name of the results file, in place of recovery")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th cell, from the i-th on")
    parser.add_argument("--merge", nargs="+", default=[], help="take the runs of these results as well; measure none")
    common.add_model(parser, quantized_layers=True)
    options = parser.parse_args()
    with common.subject(options) as base:
        result = benchmark(options, base)
    header = ("bits", "rank", "text", "full", "quantised", "stock", "ours", "stock share", "our share")
    common.table(header, [[row[name] for name in header] for row in result["shares"]])
    if result["same bytes"]:
        header = ("factor_bits", "rank", "adapter bytes", "text", "share", "ratio")
        common.table(header, [[row[name] for name in header] for row in result["same bytes"]])

    if result["budgets"]:
        header = tuple(result["budgets"][0])
        common.table(header, [[row[name] for name in header] for row in result["budgets"]])


if __name__ == "__main__":
    main()
