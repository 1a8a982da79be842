"""What does it cost to keep a run's state, so that it can be gone on with after it was killed?

A run that keeps its state and one that does not take turns in one process, on the same data. Beside the ratio of their
times stands the share of its time that a run spends in keeping, by the clock around it: runs of some minutes differ by
more than what keeping takes. A budget's survey is made anew each time, in a cache of its own.

    python benchmarks/resume.py --json
    python benchmarks/resume.py --layers 2 --repeats 1 --kinds rank
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import torch
from stopwatch import Stopwatch

from gptqmodel_eora_ext.hosts.jobs import AdapterJob, QuantizeJob
from gptqmodel_eora_ext.hosts.refine import refine_checkpoint
from gptqmodel_eora_ext.hosts.registry import adapter_maker, quantizer
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.loop.resume import Keeping
from gptqmodel_eora_ext.plan import survey as plan_survey
from gptqmodel_eora_ext.refine import progress
from gptqmodel_eora_ext.system import kept

SAMPLES, SEQLEN = 64, 256
RANK = {"rank": 32}
BUDGET = {"budget": "0.5bpw", "factor_bits": 4}
GPTQ = {"bits": 2, "group_size": 64, "sym": True}
# Fewer steps than AutoRound's own 200, so that keeping shows.
AUTOROUND = {**GPTQ, "iters": 20, "format": "auto_round"}
REFINED_TOKENS = 40_000
# What is asked for, by kind of run.
KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "rank": ("gptq", RANK),
    "budget": ("gptq", BUDGET),
    "autoround": ("autoround", RANK),
    "autoround, budget": ("autoround", BUDGET),
    "generate": ("generate", RANK),
    "refine": ("refine", {}),
}


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Have what is measured of a model be measured again."""
    usual = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if usual is not None:
            os.environ["XDG_CACHE_HOME"] = usual


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Surveys and refinement keep their state always; here they do not."""
    replaced = [(plan_survey, "kept_sweep", _none), (plan_survey, "kept_state", _in_use),
                (progress.Progress, "write", lambda self, outcome: None)]  # fmt: skip
    originals = [getattr(owner, name) for owner, name, _ in replaced]
    for owner, name, stand_in in replaced:
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(replaced, originals, strict=True):
            setattr(owner, name, original)


@contextmanager
def _none(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield None


def _in_use(*args: Any, **kwargs: Any) -> Any:
    raise kept.InUse("as where another process measures the same")


def run(base: common.Subject, kind: str, finished: Path, folder: Path, *, keeping: bool) -> float:
    """Seconds of one run from the loaded libraries to the written files."""
    how, asked = KINDS[kind]
    windows = common.calibration(base, SAMPLES, SEQLEN)
    where = Keeping(folder / "kept") if keeping else None
    start = time.perf_counter()
    if how == "refine":
        ids = torch.tensor([one["input_ids"] for one in windows]).flatten()[:REFINED_TOKENS].view(-1, SEQLEN)
        cut = [{"input_ids": row.tolist()} for row in ids]
        refine_checkpoint(finished, str(base.folder), cut, output=folder / "refined", tokens=ids.numel(), window=SEQLEN)
    elif how == "generate":
        job = AdapterJob(str(base.folder), finished, windows, asked, output=folder / "adapter",
                         batch_size=common.BATCH_SIZE, keeping=where)  # fmt: skip
        adapter_maker(finished)(job)
    else:
        settings = GPTQ if how == "gptq" else AUTOROUND
        quantizer(how)(
            QuantizeJob(str(base.folder), folder / "out", windows, settings, asked, batch_size=common.BATCH_SIZE,
                        keeping=where)
        )  # fmt: skip
    return time.perf_counter() - start


def measure(base: common.Subject, kind: str, finished: Path, repeats: int) -> dict[str, Any]:
    """Both ways, taking turns."""
    seconds: dict[str, list[float]] = {"kept": [], "not kept": []}
    shares: list[float] = []
    watch = Stopwatch(nested=False)
    watch.watch(kept.Kept, "keep", "keeping")
    watch.watch(progress.Progress, "write", "keeping")
    for _ in range(repeats):
        for way in seconds:
            with common.scratch() as folder, own_cache(folder / "cache"):
                watch.take()
                if way == "kept":
                    seconds[way].append(run(base, kind, finished, folder, keeping=True))
                    shares.append(watch.take().get("keeping", 0.0) / seconds[way][-1])
                else:
                    with nothing_kept():
                        seconds[way].append(run(base, kind, finished, folder, keeping=False))
    ratio = statistics.median(seconds["kept"]) / statistics.median(seconds["not kept"])
    return {"seconds": seconds, "ratio": ratio, "share of the time in keeping": statistics.median(shares)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    common.add_model(parser)
    options = parser.parse_args()
    with common.subject(options) as base, common.scratch() as made, quiet():
        finished = made / "out"
        windows = common.calibration(base, SAMPLES, SEQLEN)
        # Thread pools and kernels start up once; generate and refine need a checkpoint.
        quantizer("gptq")(QuantizeJob(str(base.folder), finished, windows[:8], GPTQ, RANK, batch_size=1))
        result = common.kept(base.results("resume"))
        setup = {"samples": SAMPLES, "seqlen": SEQLEN, "layers": options.layers or "all", "repeats": options.repeats}
        for kind in options.kinds:
            found = measure(base, kind, finished, options.repeats)
            result[kind] = {"measured": common.measured(base), "setup": setup, **found}
            common.keep(base.results("resume"), result)
    common.keep(base.results("resume"), result, as_json=options.json)
    rows = [
        [kind, statistics.median(result[kind]["seconds"]["not kept"]), result[kind]["ratio"],
         result[kind]["share of the time in keeping"]]
        for kind in KINDS
        if kind in result
    ]  # fmt: skip
    common.table(("run", "seconds, nothing kept", "ratio", "share in keeping"), rows)


if __name__ == "__main__":
    main()
