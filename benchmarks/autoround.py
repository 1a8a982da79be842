"""What does an adapter win back on AutoRound's 2-bit checkpoints: made in its loop, afterwards, by GPTQModel's `Lora`?

Recovered share = (loss_q − loss_adapter) / (loss_q − loss_full) on held-out text, in nats per token, against AutoRound
alone. Same calibration and rank for all. Each also tells its time and peak memory: compensation in the loop against
AutoRound alone, `generate` against stock's. A process a run, so that peak memory is the run's own; results are kept
after every run, so that an interrupted benchmark goes on. With `--workers`, so many run at a time on as many threads as
that leaves each, and what is compared runs side by side.

    python benchmarks/autoround.py --workers 2 --json
    python benchmarks/autoround.py --layers 4 --group-sizes 64 --ranks 32      # a look at it
    python benchmarks/autoround.py --device cuda
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import common
import torch
from cost import high_water_mark
from gptqmodel import GPTQModel
from gptqmodel.adapter.adapter import Lora

from gptqmodel_eora_ext import EoRA, EoRAConfig
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.system.files import cache_folder

BITS = 2
# The one export that GPTQModel's own `generate` opens.
FORMAT = "auto_gptq"
# 16k tokens: a run takes minutes on two cores, and all contenders see the same.
SAMPLES, SEQLEN = 64, 256
NAME = "autoround"
# Kinds that start from the checkpoint of "alone".
READERS = ("afterwards", "stock")


@dataclass(frozen=True)
class Cell:
    """One run. kind: "alone" (AutoRound), "in loop", "afterwards" (`generate` with `EoRA`), "stock" (with `Lora`)."""

    kind: str
    group_size: int
    rank: int = 0


def cells_of(group_sizes: list[int], ranks: list[int]) -> list[list[Cell]]:
    """All cells: those that quantise, then those that read what `alone` made; beside each other what is compared."""
    quantise = []
    for number, rank in enumerate(ranks):
        for group_size in group_sizes:
            quantise += [Cell("alone", group_size)] * (not number) + [Cell("in loop", group_size, rank)]
    pairs = itertools.product(group_sizes, ranks)
    return [quantise, [Cell(kind, group_size, rank) for group_size, rank in pairs for kind in READERS]]


def cell_of(run: dict[str, Any]) -> Cell:
    return Cell(**{one.name: run[one.name] for one in fields(Cell)})


def quantize(base: common.Subject, folder: Path, cell: Cell, iters: int, device: str) -> tuple[Path, float]:
    """AutoRound, with compensation in its loop or alone."""
    from auto_round import AutoRound

    algorithms: list[Any] = ["signround"]
    if cell.kind == "in loop":
        algorithms.append(EoRAConfig(rank=cell.rank))
    windows = [torch.tensor([window["input_ids"]]) for window in common.calibration(base, SAMPLES, SEQLEN)]
    start = time.perf_counter()
    quantizer = AutoRound(
        str(base.folder), tokenizer=common.tokenizer(base), scheme=f"W{BITS}A16", group_size=cell.group_size,
        iters=iters, alg_configs=algorithms, dataset=windows, nsamples=SAMPLES, seqlen=SEQLEN,
        batch_size=common.BATCH_SIZE, device_map=device, format=FORMAT,
    )  # fmt: skip
    _, made = quantizer.quantize_and_save(str(folder), format=FORMAT)
    return Path(made), time.perf_counter() - start


def one(cell: Cell, base: common.Subject, folder: Path, iters: int, windows: int, device: str) -> dict[str, Any]:
    """Run a cell in this process."""
    checkpoint = _checkpoint(folder, cell)
    adapter = None
    if cell.kind in ("alone", "in loop"):
        place = checkpoint if cell.kind == "alone" else folder / f"g{cell.group_size}-r{cell.rank}"
        made, seconds = quantize(base, place, cell, iters, device)
    else:
        (made,) = checkpoint.iterdir()
        place = folder / f"{cell.kind}-g{cell.group_size}-r{cell.rank}"
        kind = EoRA if cell.kind == "afterwards" else Lora
        start = time.perf_counter()
        with quiet():
            GPTQModel.adapter.generate(
                adapter=kind(rank=cell.rank, path=str(place)), model_id_or_path=str(base.folder),
                quantized_model_id_or_path=str(made), calibration_dataset=common.calibration(base, SAMPLES, SEQLEN),
                batch_size=common.BATCH_SIZE, device=device,
            )  # fmt: skip
        seconds = time.perf_counter() - start
        adapter = kind(rank=cell.rank, path=str(place))
    memory = high_water_mark() if device == "cpu" else torch.cuda.max_memory_allocated()
    with quiet():
        dense = common.densified(made, base, adapter).to(device)
        losses = common.losses(dense, common.held_out(base), windows)
    return {**asdict(cell), "seconds": seconds, "peak bytes": memory, "loss": losses, "measured": common.measured(base)}


def rows_of(runs: list[dict[str, Any]], full: dict[str, float]) -> list[dict[str, Any]]:
    """One row a group size, rank and text: recovered shares of the three."""
    found = {cell_of(run): run for run in runs}
    rows = []
    for group_size, rank in sorted({(cell.group_size, cell.rank) for cell in found if cell.rank}):
        plain = found[Cell("alone", group_size)]["loss"]
        for text in common.common_texts(plain, full):
            row: dict[str, Any] = {"group size": group_size, "rank": rank, "text": text, "full": full[text],
                                   "quantised": plain[text]}  # fmt: skip
            for kind in ("in loop", "afterwards", "stock"):
                run = found.get(Cell(kind, group_size, rank))
                measured = run["loss"].get(text) if run else None
                row[kind] = None if measured is None else (plain[text] - measured) / (plain[text] - full[text])
            rows.append(row)
    return rows


def costs_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a group size and rank: what compensation costs, in time and peak memory."""
    found = {cell_of(run): run for run in runs}
    rows = []
    for group_size, rank in sorted({(cell.group_size, cell.rank) for cell in found if cell.rank}):
        row: dict[str, Any] = {"group size": group_size, "rank": rank}
        for kind, against in (("in loop", Cell("alone", group_size)), ("afterwards", Cell("stock", group_size, rank))):
            run, other = found.get(Cell(kind, group_size, rank)), found.get(against)
            if run and other:
                row[f"{kind} / {against.kind}, seconds"] = run["seconds"] / other["seconds"]
                row[f"{kind} / {against.kind}, peak bytes"] = run["peak bytes"] / other["peak bytes"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--iters", type=int, default=50, help="AutoRound's tuning steps per block")
    parser.add_argument("--windows", type=int, default=24, help="held-out windows of 512 tokens per text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=cache_folder() / "benchmarks" / NAME, help="for checkpoints")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--fresh", action="store_true", help="measure again what the results file already holds")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    common.add_model(parser)
    options = parser.parse_args()
    with common.subject(options) as base:
        if options.cell is None:
            benchmark(options, base)
            return
        found = one(Cell(**options.cell), base, options.folder, options.iters, options.windows, options.device)
        print(json.dumps(found), file=sys.__stdout__)


def benchmark(options: argparse.Namespace, base: common.Subject) -> None:
    """Run all cells that the results file lacks."""
    setup = {"bits": BITS, "format": FORMAT, "samples": SAMPLES, "seqlen": SEQLEN, "iters": options.iters,
             "layers": options.layers, "windows": options.windows, "device": _named(options.device),
             "workers": options.workers}  # fmt: skip
    path = base.results(NAME)
    previous = {} if options.fresh else common.kept(path, setup)
    runs: list[dict[str, Any]] = previous.get("runs", [])
    made_from = "-".join(str(setup[name]) for name in ("layers", "iters", "samples", "seqlen"))
    folder = options.work / f"{made_from}{base.suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    full = common.full_precision(previous, base, common.held_out(base), options.windows, options.device)
    threads = max(torch.get_num_threads() // options.workers, 1)

    def run(cell: Cell) -> dict[str, Any]:
        """A cell in a process of its own, with this one's options."""
        command = [sys.executable, *sys.argv, "--cell", json.dumps(asdict(cell)), "--folder", str(folder),
                   "--model", str(base.folder), "--layers", "0"]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        found["measured"]["model"] = base.name  # where the process has seen a folder only
        return found

    for cells in cells_of(options.group_sizes, options.ranks):
        todo = [cell for cell in cells if cell not in map(cell_of, runs)]
        # What stands in for a checkpoint that is gone from the work folder.
        gone = {cell.group_size for cell in todo if cell.kind in READERS and not _checkpoint(folder, cell).is_dir()}
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(lambda group_size: run(Cell("alone", group_size)), gone))
            for done in as_completed([pool.submit(run, cell) for cell in todo]):
                runs.append(done.result())
                common.keep(path, summary(setup, full, runs))
    result = summary(setup, full, runs)
    common.keep(path, result, as_json=options.json)
    for part in ("shares", "costs"):
        if result[part]:
            header = tuple(result[part][-1])
            common.table(header, [[row.get(name) for name in header] for row in result[part]])


def summary(setup: dict[str, Any], full: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    shares = rows_of(runs, full["full"])
    return {"setup": setup, **full, "runs": runs, "shares": shares, "costs": costs_of(runs)}


def _checkpoint(folder: Path, cell: Cell) -> Path:
    """What AutoRound alone makes."""
    return folder / f"g{cell.group_size}"


def _named(device: str) -> str:
    return device if device == "cpu" else torch.cuda.get_device_name(device)


if __name__ == "__main__":
    main()
