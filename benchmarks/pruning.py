"""How much of the loss that pruning costs does an adapter win back, against the EoRA article's own method?

Recovered share = (loss_pruned − loss_adapter) / (loss_pruned − loss_full), loss in nats per token on held-out text. The
article prunes, and afterwards makes a 16-bit adapter of one rank for all modules. Against that, at no more bytes:
4-bit factors whose ranks are chosen, made in the pruning loop (in one round and in several) and afterwards; and an SVD
of ΔW in place of EoRA, made as the article makes its adapter. With `--parts peers` the pruned model alone is also held
against what llm-compressor's modifiers make of the same model and data, in a virtual environment of its own. With
`--parts joint`, weights are pruned and quantised to 4 bits at once, and the checkpoint is evaluated without its adapter
and with it. With `--parts cost`, pruning alone, and pruning and quantising at once, are timed against the same with
compensation in the loop; that wants a quiet machine. Results are kept after every run, so that an interrupted benchmark
goes on.

    python benchmarks/pruning.py --json
    python benchmarks/pruning.py --methods wanda --budgets 0.5bpw
    python benchmarks/pruning.py --parts peers
    python benchmarks/pruning.py --parts joint cost
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import common
import torch
from recovery import BUDGET_FACTOR_BITS, BUDGETS, GROUP_SIZE, module_shapes

from gptqmodel_eora_ext.adapter.budget import budget_bytes, largest_uniform_rank
from gptqmodel_eora_ext.adapter.folder import AdapterFolder
from gptqmodel_eora_ext.adapter.presets import PRESETS
from gptqmodel_eora_ext.formats.sizes import factor_bytes
from gptqmodel_eora_ext.hosts.jobs import AdapterJob
from gptqmodel_eora_ext.hosts.prune import prune
from gptqmodel_eora_ext.hosts.registry import adapter_maker
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.system.files import cache_folder

# 16k tokens: ten times the width of the widest input, so that C is of full rank.
SAMPLES, SEQLEN = 64, 256
PATTERN = "2:4"
METHODS = ("sparsegpt", "wanda")
# None; ours in the loop, once with as many rounds as the preset "best" has (W − BA is pruned again, which only the loop
# can do); ours afterwards; the article's; the same by SVD.
KINDS = ("none", "loop", "rounds", "after", "article", "svd")
IN_LOOP = ("loop", "rounds")
PARTS = ("adapters", "peers", "joint", "cost")
# Of "joint" and "cost": what SparseGPT's joint form quantises to.
JOINT_METHOD, JOINT_BITS = "sparsegpt", 4
# What is timed: pruning alone, and with one rank for all in the loop, of no more bytes than this budget. Choosing ranks
# takes a survey before the loop, whose time `survey.py` tells.
COST_BUDGET = "0.5bpw"
TIMED = ("alone", "with adapter", "joint alone", "joint with adapter")
# It pins other versions of transformers and auto-round than this project has.
PEER = "llmcompressor==0.14.0.1"


@dataclass(frozen=True)
class Cell:
    """One run."""

    kind: str
    method: str
    budget: str | None = None


def cell_of(run: Mapping[str, Any]) -> Cell:
    return Cell(**{one.name: run[one.name] for one in fields(Cell)})


def options_of(base: common.Subject, cell: Cell) -> dict[str, Any] | None:
    """What `EoRA` is given: the article's rank is the least that takes no fewer bytes than the budget."""
    if cell.budget is None:
        return None
    if cell.kind in (*IN_LOOP, "after"):
        rounds = {"rounds": PRESETS["best"].rounds} if cell.kind == "rounds" else {}
        return {"budget": cell.budget, "factor_bits": BUDGET_FACTOR_BITS, **rounds}
    shapes = module_shapes(base)
    rank = -(-budget_bytes(cell.budget, shapes) // sum(factor_bytes(1, shape, 16) for shape in shapes))
    return {"rank": rank, "objective": "svd" if cell.kind == "svd" else "eora"}


class Pruned:
    """Models that are pruned alone, each made once, when it is first asked for."""

    def __init__(self, base: common.Subject, stack: ExitStack) -> None:
        self._base = base
        self._stack = stack

    @functools.cache  # noqa: B019, it lives as long as the process
    def folder(self, method: str) -> Path:
        folder = self._stack.enter_context(common.scratch()) / method
        with quiet():
            prune(str(self._base.folder), folder, calibration(self._base), method=method, pattern=PATTERN,
                  batch_size=common.BATCH_SIZE)  # fmt: skip
        return folder


def calibration(base: common.Subject) -> list[dict[str, list[int]]]:
    return common.calibration(base, SAMPLES, SEQLEN)


def adapted(folder: Path, adapter: Path | None) -> Any:
    """A pruned model in bfloat16, with an adapter's factors beside its weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if adapter is not None:
        stored = AdapterFolder.open(adapter)
        for name, factors in stored.factors(list(stored.keys)):
            down, up = (one.to(torch.bfloat16).T.contiguous() for one in (factors.lora_A, factors.lora_B))
            model.set_submodule(name, common.Corrected(model.get_submodule(name), down, up))
    return model.to(common.device())


def measure(base: common.Subject, cell: Cell, pruned: Pruned, texts: dict[str, Any], windows: int) -> dict[str, Any]:
    """Prune or take what is pruned, make the adapter, evaluate."""
    chosen = options_of(base, cell)
    with common.scratch() as scratch, quiet():
        start = time.perf_counter()
        adapter = None
        if cell.kind in IN_LOOP:
            folder = prune(str(base.folder), scratch / "model", calibration(base), method=cell.method, pattern=PATTERN,
                           adapter=chosen, batch_size=common.BATCH_SIZE)  # fmt: skip
            adapter = folder / "eora"
        else:
            folder = pruned.folder(cell.method)
            if chosen is not None:
                start = time.perf_counter()
                job = AdapterJob(str(base.folder), folder, calibration(base), chosen, scratch / "adapter",
                                 batch_size=common.BATCH_SIZE)  # fmt: skip
                adapter = adapter_maker(folder)(job)
        seconds = time.perf_counter() - start
        size = (adapter / "adapter_model.safetensors").stat().st_size if adapter is not None else 0
        losses = common.losses(adapted(folder, adapter), texts, windows)
    return {**asdict(cell), "options": chosen, "seconds": seconds, "adapter bytes": size, "loss": losses,
            "measured": common.measured(base)}  # fmt: skip


def shares(runs: list[dict[str, Any]], full: dict[str, float]) -> list[dict[str, Any]]:
    """One row a method, budget and text: what each kind wins back, and the ratios that are wanted."""
    found = {cell_of(run): run["loss"] for run in runs}
    rows = []
    for method, budget in dict.fromkeys((cell.method, cell.budget) for cell in found if cell.budget is not None):
        plain = found.get(Cell("none", method))
        for text in plain or ():
            lost = plain[text] - full[text]  # type: ignore[index]
            share = {
                kind: (plain[text] - found[cell][text]) / lost if (cell := Cell(kind, method, budget)) in found  # type: ignore[index]
                else math.nan
                for kind in KINDS[1:]
            }  # fmt: skip
            rows.append(
                {
                    "method": method, "budget": budget, "text": text, "full": full[text], "pruned": plain[text],  # type: ignore[index]
                    **share,
                    "loop / article": share["loop"] / share["article"],
                    "loop / after": share["loop"] / share["after"],
                    "rounds / after": share["rounds"] / share["after"],
                    "after / svd": share["after"] / share["svd"],
                    "article / svd": share["article"] / share["svd"],
                }
            )  # fmt: skip
    return rows


def measure_joint(base: common.Subject, budget: str, texts: dict[str, Any], windows: int) -> dict[str, Any]:
    """Prune and quantise at once, with chosen ranks; the checkpoint is evaluated without its adapter and with it."""
    chosen = {"budget": budget, "factor_bits": BUDGET_FACTOR_BITS}
    with common.scratch() as scratch, quiet():
        start = time.perf_counter()
        folder = prune(
            str(base.folder), scratch / "model", calibration(base), method=JOINT_METHOD, pattern=PATTERN,
            bits=JOINT_BITS, group_size=GROUP_SIZE, adapter=chosen, batch_size=common.BATCH_SIZE,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        size = (folder / "eora" / "adapter_model.safetensors").stat().st_size
        after = common.losses(common.densified(folder, base).to(common.device()), texts, windows)
        bare = common.without_adapter(folder, scratch / "bare")
        before = common.losses(common.densified(bare, base).to(common.device()), texts, windows)
    return {"method": JOINT_METHOD, "bits": JOINT_BITS, "budget": budget, "seconds": seconds, "adapter bytes": size,
            "loss before": before, "loss after": after, "measured": common.measured(base)}  # fmt: skip


def measure_cost(base: common.Subject, repeats: int) -> dict[str, Any]:
    """Seconds of pruning alone and with an adapter in the loop, in turns in this process."""
    shapes = module_shapes(base)
    rank = largest_uniform_rank(budget_bytes(COST_BUDGET, shapes), shapes, BUDGET_FACTOR_BITS)
    adapter = {"rank": rank, "factor_bits": BUDGET_FACTOR_BITS}
    given: dict[str, dict[str, Any]] = {
        "alone": {},
        "with adapter": {"adapter": adapter},
        "joint alone": {"bits": JOINT_BITS},
        "joint with adapter": {"adapter": adapter, "bits": JOINT_BITS},
    }

    def seconds(kind: str, windows: list[dict[str, list[int]]]) -> float:
        with common.scratch() as scratch, quiet():
            start = time.perf_counter()
            prune(str(base.folder), scratch / "model", windows, method=JOINT_METHOD, pattern=PATTERN,
                  batch_size=common.BATCH_SIZE, **given[kind])  # fmt: skip
            return time.perf_counter() - start

    windows = calibration(base)
    for kind in TIMED:
        seconds(kind, windows[: common.BATCH_SIZE])  # thread pools and kernels start up once
    times: dict[str, list[float]] = {kind: [] for kind in TIMED}
    for _ in range(repeats):
        for kind in TIMED:
            times[kind].append(seconds(kind, windows))
    median = {kind: statistics.median(taken) for kind, taken in times.items()}
    ratio = {kind: median[kind] / median["joint alone" if "joint" in kind else "alone"] for kind in TIMED}
    return {"rank": rank, "seconds": times, "ratio": ratio, "measured": common.measured(base)}


def peer_environment() -> Path:
    """The Python of a virtual environment with llm-compressor in it, made once."""
    folder = cache_folder() / "llmcompressor"
    python = folder / "bin" / "python"
    if not (folder / ".complete").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PEER], check=True)
        (folder / ".complete").touch()
    return python


def measure_peer(base: common.Subject, method: str, texts: dict[str, Any], windows: int) -> dict[str, Any]:
    """Have llm-compressor prune the same model on the same windows; evaluated here."""
    script = Path(__file__).with_name("pruning_peer.py")
    with common.scratch() as scratch:
        (scratch / "windows.json").write_text(json.dumps([one["input_ids"] for one in calibration(base)]))
        start = time.perf_counter()
        subprocess.run(
            [str(peer_environment()), str(script), str(base.folder), str(scratch / "windows.json"),
             str(scratch / "model"), method, PATTERN],
            check=True, env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )  # fmt: skip
        seconds = time.perf_counter() - start
        losses = common.losses(adapted(scratch / "model", None), texts, windows)
    return {"method": method, "peer": PEER, "seconds": seconds, "loss": losses, "measured": common.measured(base)}


def benchmark(options: argparse.Namespace, base: common.Subject) -> dict[str, Any]:
    """Measure the cells that the results file lacks."""
    setup = {"samples": SAMPLES, "seqlen": SEQLEN, "pattern": PATTERN, "windows": options.windows}
    path = base.results(options.out or "pruning")
    previous = {} if options.fresh else common.kept(path, setup)
    runs, peers, joint = (list(previous.get(part, [])) for part in ("runs", "peers", "joint"))
    cost = previous.get("cost")
    texts = common.held_out(base)
    full = common.full_precision(previous, base, texts, options.windows, common.device())

    def result() -> dict[str, Any]:
        plain = {run["method"]: run["loss"] for run in runs if run["kind"] == "none"}
        compared = [
            {"method": one["method"], "text": text, "perplexity": math.exp(plain[one["method"]][text]),
             "llm-compressor": math.exp(loss), "ratio": math.exp(plain[one["method"]][text] - loss)}
            for one in peers if one["method"] in plain for text, loss in one["loss"].items()
        ]  # fmt: skip
        return {"setup": setup, **full, "runs": runs, "peers": peers, "joint": joint, "cost": cost,
                "shares": shares(runs, full["full"]), "against llm-compressor": compared}  # fmt: skip

    wanted = [Cell("none", method) for method in options.methods if {"adapters", "peers"} & set(options.parts)]
    if "adapters" in options.parts:
        wanted += [Cell(kind, method, budget) for budget in options.budgets for method in options.methods
                   for kind in KINDS[1:]]  # fmt: skip
    with ExitStack() as stack:
        pruned = Pruned(base, stack)
        for cell in wanted:
            if cell not in map(cell_of, runs):
                runs.append(measure(base, cell, pruned, texts, options.windows))
                common.keep(path, result())
    for method in options.methods if "peers" in options.parts else ():
        if method not in (one["method"] for one in peers):
            peers.append(measure_peer(base, method, texts, options.windows))
            common.keep(path, result())
    for budget in options.budgets if "joint" in options.parts else ():
        if budget not in (one["budget"] for one in joint):
            joint.append(measure_joint(base, budget, texts, options.windows))
            common.keep(path, result())
    if "cost" in options.parts:
        cost = measure_cost(base, options.repeats)
    common.keep(path, result(), as_json=options.json)
    return result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--windows", type=int, default=24, help="held-out windows of 512 tokens per text")
    parser.add_argument("--repeats", type=int, default=3, help="of what is timed, in turns")
    parser.add_argument("--fresh", action="store_true", help="measure again what the results file already holds")
    parser.add_argument("--out", help="name of the results file, in place of pruning")
    common.add_model(parser)
    options = parser.parse_args()
    with common.subject(options) as base:
        result = benchmark(options, base)
    for rows in (result["shares"], result["against llm-compressor"]):
        if rows:
            common.table(tuple(rows[0]), [list(row.values()) for row in rows])
    if result["joint"]:
        common.table(
            ("bits", "budget", "text", "full", "before", "after", "recovered share"),
            [[one["bits"], one["budget"], text, full := result["full"][text], before,
              after := one["loss after"][text], (before - after) / (before - full)]
             for one in result["joint"] for text, before in one["loss before"].items()],
        )  # fmt: skip
    if result["cost"]:
        common.table(("run", "seconds", "ratio"),
                     [[kind, statistics.median(result["cost"]["seconds"][kind]), ratio]
                      for kind, ratio in result["cost"]["ratio"].items()])  # fmt: skip


if __name__ == "__main__":
    main()
