"""What does refining an adapter win, by loss, tokens and size, and what does it cost beside a plain PyTorch loop?

Shares are those of `recovery.py`, whose losses of the full-precision and the plainly quantised model are taken over:
(loss_q − loss_adapter) / (loss_q − loss_full), GPTQ at 2 bits in groups of 64. Each budget is quantised once by the
preset "balanced" and kept below `--checkpoints`; every refinement begins there, with the factors as stored, on C4, and
is evaluated as it is stored. Results are kept after every run. Seconds are without the full-precision model's, whose
outputs the runs share.

    python benchmarks/refine.py --parts shares --budgets 0.5bpw 0.25bpw --losses kl --tokens 160k
    python benchmarks/refine.py --parts cost

The part "cost" takes the same windows through two processes: `refine_checkpoint`, and a loop as one writes it in
PyTorch, with dense Ŵ and factors in bfloat16 as parameters of a transformers model, the full-precision model beside it,
`kl_div` of whole logits, and torch's Adam. Peak memory is the process's resident set.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import common
import torch
from gptqmodel import GPTQModel, QuantizeConfig

from gptqmodel_eora_ext import EoRA, refine_checkpoint
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.refine import CHOICES, DEFAULT_WINDOW
from gptqmodel_eora_ext.refine import run as refine_run
from gptqmodel_eora_ext.refine.settings import DEFAULT_TOKENS, parse_tokens, validated
from gptqmodel_eora_ext.refine.training import VALIDATIONS
from gptqmodel_eora_ext.system.files import cache_folder

BITS, GROUP_SIZE, SCALE_SEARCH = 2, 64, 2.4
# As in `recovery.py`.
SAMPLES, SEQLEN = 32, 256
TEXTS = ("wikitext2", "c4")
PARTS = ("shares", "cost")
START = "start"
# Windows of the part "cost", of which a fifth validates; the plain loop trains on all of fewer.
COST_WINDOWS, PLAIN_STEPS = 20, 5
COST_BUDGET = "0.5bpw"
OURS, PLAIN = "ours", "plain"


@dataclass(frozen=True)
class Cell:
    """A refinement, or the adapter that one begins with.

    Attributes:
        budget: of the adapter.
        by: the loss that it was trained by; `START` for none.
        tokens: of C4.
        passes: over them.
    """

    budget: str
    by: str = START
    tokens: int = 0
    passes: int = 1


def cell_of(run: dict[str, Any]) -> Cell:
    return Cell(**{one.name: run[one.name] for one in fields(Cell) if one.name in run})


def quantised(base: common.Subject, budget: str, folder: Path) -> Path:
    """The checkpoint of a budget, made on first use."""
    checkpoint = folder / f"q{budget}{base.suffix}"
    if not (checkpoint / "config.json").is_file():
        with quiet():
            model = GPTQModel.load(str(base.folder), QuantizeConfig(bits=BITS, group_size=GROUP_SIZE, mse=SCALE_SEARCH))
            calibration = common.calibration(base, SAMPLES, SEQLEN)
            adapter = EoRA(preset="balanced", budget=budget)
            model.quantize(calibration, batch_size=common.BATCH_SIZE, adapter=adapter)
            model.save(str(checkpoint))
    return checkpoint


def fingerprint(checkpoint: Path) -> str:
    """Of a checkpoint's adapter. Made anew, by another version or on another processor, it is another, from which
    refinement begins elsewhere."""
    with (checkpoint / "eora" / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def measure(
    base: common.Subject, cell: Cell, checkpoint: Path, texts: dict[str, torch.Tensor], windows: int
) -> dict[str, Any]:
    """Refine where that is asked, and evaluate what is stored."""
    told: dict[str, Any] = {}
    with common.scratch() as folder:
        adapter = checkpoint / "eora"
        if cell.by != START:
            calibration = common.calibration(base, cell.tokens // DEFAULT_WINDOW, DEFAULT_WINDOW)
            with one_teacher(checkpoint.parent):
                outcome = refine_checkpoint(checkpoint, str(base.folder), calibration, adapter=adapter,
                                            output=folder / "refined", loss=cell.by, tokens=cell.tokens,
                                            passes=cell.passes, training=_say(cell))  # fmt: skip
            told = outcome.described()
            adapter = folder / "refined"
        with quiet():
            nats = common.losses(common.densified(checkpoint, base, EoRA(path=adapter)), texts, windows)
    return {
        **asdict(cell),
        **told,
        "nats": nats,
        "began with": fingerprint(checkpoint),
        "measured": common.measured(base),
    }


@contextmanager
def one_teacher(folder: Path) -> Iterator[None]:
    """Have refinements within the block share what the full-precision model computes: their windows are the same, or
    the first of them, so the longest is to come first. The model takes a fifth of a refinement's time."""
    usual = refine_run.keep_teacher

    def shared(base: str, modules: Any, ids: torch.Tensor, path: Path, *args: Any, **kwargs: Any) -> None:
        kept = sorted(folder.glob("teacher-*.safetensors"), key=lambda one: int(one.stem.split("-")[1]))
        fitting = [one for one in kept if int(one.stem.split("-")[1]) >= len(ids)]
        if not fitting:
            fitting = [folder / f"teacher-{len(ids)}.safetensors"]
            usual(base, modules, ids, fitting[0], *args, **kwargs)
        path.hardlink_to(fitting[0])

    refine_run.keep_teacher = shared
    try:
        yield
    finally:
        refine_run.keep_teacher = usual


def _say(cell: Cell) -> Any:
    return lambda done, total, note: print(f"{cell}: {done} of {total}, {note}", file=sys.stderr, flush=True)


def shares(runs: list[dict[str, Any]], full: dict[str, float], plain: dict[str, float]) -> list[dict[str, Any]]:
    """One row a run and text."""
    rows = [
        {
            **asdict(cell_of(run)),
            "minutes": run.get("seconds", 0) / 60,
            "text": text,
            "nats": run["nats"][text],
            "share": (plain[text] - run["nats"][text]) / (plain[text] - full[text]),
        }
        for run in runs
        for text in common.common_texts(run["nats"], full, plain)
    ]
    return sorted(
        rows, key=lambda row: (row["text"], row["budget"], row["by"] != START, row["by"], row["tokens"], row["passes"])
    )


def benchmark_shares(options: argparse.Namespace, base: common.Subject) -> dict[str, Any]:
    """Measure the cells that the results file lacks."""
    recovery = common.kept(base.results("recovery"))
    windows = options.windows or recovery["setup"]["windows"]
    setup = {"samples": SAMPLES, "seqlen": SEQLEN, "bits": BITS, "group_size": GROUP_SIZE, "mse": SCALE_SEARCH,
             "window": DEFAULT_WINDOW, "windows": windows}  # fmt: skip
    path = base.results(options.out)
    result = common.kept(path, setup)
    runs = result.setdefault("runs", [])
    full = recovery["full"]
    plain = next(run["loss"] for run in recovery["runs"] if run["kind"] == "none" and run["bits"] == BITS)
    texts = {name: ids for name, ids in common.held_out(base).items() if name in TEXTS}
    for budget in options.budgets:
        checkpoint = quantised(base, budget, options.checkpoints)
        # Runs that began with another adapter of this budget say nothing beside new ones.
        begun = fingerprint(checkpoint)
        runs[:] = [run for run in runs if run["budget"] != budget or run.get("began with") == begun]
        cells = [
            Cell(budget),
            *(Cell(budget, by, tokens, options.passes) for tokens in options.tokens for by in options.losses),
        ]
        for cell in cells:
            if cell not in map(cell_of, runs):
                runs.append(measure(base, cell, checkpoint, texts, windows))
            rows = shares(runs, full, plain)
            common.keep(path, {**result, "setup": setup, "full": full, "quantised": plain, "shares": rows})
    return common.kept(path)


def now() -> torch.Tensor:
    """Seconds: of the clock, and of the processor (all threads), which other programs on the machine do not add to."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def median(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(rows)).median(0).values


def ours(base: common.Subject, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Seconds a window of each part of a refinement."""
    times: list[torch.Tensor] = []
    teaching: list[torch.Tensor] = []
    with common.scratch() as folder, quiet():
        refine_checkpoint(
            checkpoint, str(base.folder), common.calibration(base, COST_WINDOWS, DEFAULT_WINDOW),
            adapter=checkpoint / "eora", output=folder / "refined", tokens=COST_WINDOWS * DEFAULT_WINDOW,
            teaching=lambda done, total: teaching.append(now()), training=lambda done, total, note: times.append(now()),
        )  # fmt: skip
    held = validated(COST_WINDOWS)
    every = (COST_WINDOWS - held) // VALIDATIONS
    steps = [second - first for first, second in itertools.pairwise(times)]
    step = median([one for number, one in enumerate(steps, 2) if number % every])
    validation = (median([one for number, one in enumerate(steps, 2) if number % every == 0]) - step) / held
    return {"teacher": (teaching[-1] - teaching[0]) / COST_WINDOWS, "step": step, "validation": validation}


def plain_loop(base: common.Subject, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Seconds a step of a plain loop."""
    with quiet():
        model = common.densified(checkpoint, base)
        teacher = common.base_model(base)
    parameters = []
    copies: dict[int, torch.nn.Parameter] = {}
    for module in list(model.modules()):
        # Copies, since what was dequantised in inference mode cannot take part in a gradient; tied ones stay tied.
        for name, parameter in list(module.named_parameters(recurse=False)):
            copy = copies.setdefault(id(parameter), torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
            setattr(module, name, copy)
        if isinstance(module, common.Corrected):
            for name in ("lora_A", "lora_B"):
                factor = torch.nn.Parameter(getattr(module, name).clone())
                delattr(module, name)
                module.register_parameter(name, factor)
                parameters.append(factor)
    adam = torch.optim.Adam(parameters, lr=1e-3)
    seconds = []
    for window in common.calibration(base, PLAIN_STEPS, DEFAULT_WINDOW):
        start = now()
        ids = torch.tensor([window["input_ids"]])
        with torch.no_grad():
            wanted = teacher(ids).logits.float().log_softmax(-1)
        found = model(ids).logits.float().log_softmax(-1)
        loss = torch.nn.functional.kl_div(found[0], wanted[0], reduction="batchmean", log_target=True)
        loss.backward()
        adam.step()
        adam.zero_grad()
        seconds.append(now() - start)
    return {"step": median(seconds[1:])}


def benchmark_cost(options: argparse.Namespace, base: common.Subject) -> dict[str, Any]:
    """Both contenders, each in a process of its own, in turns."""
    checkpoint = quantised(base, COST_BUDGET, options.checkpoints)
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], PLAIN: []}
    for _ in range(options.repeats):
        for one in runs:
            command = [sys.executable, __file__, "--one", one, "--checkpoints", str(options.checkpoints),
                       "--model", options.model]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
            runs[one].append(json.loads(done.stdout.strip().splitlines()[-1]))

    def found(one: str, name: str) -> torch.Tensor:
        return median([torch.tensor(run[name], dtype=torch.float64) for run in runs[one]])

    windows = DEFAULT_TOKENS // DEFAULT_WINDOW
    held = validated(windows)
    total = windows * found(OURS, "teacher") + (windows - held) * found(OURS, "step")
    total += (VALIDATIONS + 1) * held * found(OURS, "validation")
    against = windows * found(PLAIN, "step")
    result: dict[str, Any] = {"checkpoint": checkpoint.name, "runs": runs}
    for place, of in enumerate(("clock", "processor")):
        result |= {f"minutes of 160k tokens, {of}": float(total[place]) / 60,
                   f"plain minutes, {of}": float(against[place]) / 60,
                   f"time ratio, {of}": float(total[place] / against[place])}  # fmt: skip
    result["memory ratio"] = float(found(OURS, "peak MB") / found(PLAIN, "peak MB"))
    result["measured"] = common.measured(base)
    common.keep(base.results(f"{options.out}_cost"), result)
    return result


def _tokens(text: str) -> int:
    return parse_tokens(text, what="--tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--budgets", nargs="+", default=["0.5bpw", "0.25bpw"])
    parser.add_argument("--losses", nargs="+", default=list(CHOICES), choices=CHOICES)
    parser.add_argument("--tokens", nargs="+", default=[DEFAULT_TOKENS], type=_tokens, help="as 160k")
    parser.add_argument("--passes", type=int, default=1, help="over the tokens")
    parser.add_argument("--windows", type=int, default=0, help="held-out windows a text; by default as recovery.py's")
    parser.add_argument("--checkpoints", type=Path, default=cache_folder() / "benchmark-refine")
    parser.add_argument("--repeats", type=int, default=2, help="of the part cost")
    parser.add_argument("--out", default="refine", help="name of the results file")
    parser.add_argument("--one", choices=(OURS, PLAIN), help="measure one contender of the part cost, in this process")
    common.add_model(parser)
    options = parser.parse_args()
    with common.subject(options) as base:
        if options.one:
            checkpoint = quantised(base, COST_BUDGET, options.checkpoints)
            seconds = (ours if options.one == OURS else plain_loop)(base, checkpoint)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
            print(json.dumps({**{name: one.tolist() for name, one in seconds.items()}, "peak MB": peak}))
            return
        if "shares" in options.parts:
            rows = benchmark_shares(options, base)["shares"]
            common.table(tuple(rows[0]), [list(row.values()) for row in rows])
        if "cost" in options.parts:
            cost = benchmark_cost(options, base)
            names = [name for name, value in cost.items() if isinstance(value, float)]
            common.table(names, [[cost[name] for name in names]])


if __name__ == "__main__":
    main()
