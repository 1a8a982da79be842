"""What does `GPTQModel.adapter.generate` cost for a finished checkpoint, with EoRA and with GPTQModel's own `Lora`?

A process a run, so that peak memory is the run's own. Part of `python benchmarks/solver.py`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
from cost import high_water_mark
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import Lora
from gptqmodel.looper import eora_processor
from gptqmodel.looper.module_looper import ModuleLooper
from stopwatch import Stopwatch

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.capture import OutputErrorMoment, SecondMoment
from gptqmodel_eora_ext.hosts.gptqmodel import compensation as processors
from gptqmodel_eora_ext.hosts.terminal import quiet

RANK = 32
BITS = 3
SAMPLES, SEQLEN = 64, 256
REPEATS = 2
KINDS = ("ours", "stock")


def one(kind: str, base: common.Subject, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Generate once in this process."""
    watch = Stopwatch()
    watch.watch(GPTQModel, "load", "loading both models")
    watch.watch(ModuleLooper, "loop", "layer loop, of it:")
    watch.watch(SecondMoment, "add", "  second moments")
    watch.watch(OutputErrorMoment, "add", "  second moments")
    watch.watch(processors, "compensate", "  solving")
    watch.watch(eora_processor, "eora_process_input", "  second moments")
    watch.watch(eora_processor, "eora_compute_lora", "  solving")
    adapter = EoRA(rank=RANK, path=folder) if kind == "ours" else Lora(rank=RANK, path=str(folder))
    calibration = common.calibration(base, SAMPLES, SEQLEN)
    start = time.perf_counter()
    with quiet():
        GPTQModel.adapter.generate(
            adapter=adapter,
            model_id_or_path=str(base.folder),
            quantized_model_id_or_path=str(checkpoint),
            calibration_dataset=calibration,
            batch_size=common.BATCH_SIZE,
        )
    total = time.perf_counter() - start
    return {"seconds": total, "parts": dict(watch.seconds), "peak bytes": high_water_mark()}


def measure(base: common.Subject) -> dict[str, Any]:
    """Both contenders, interleaved, on one checkpoint."""
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with common.scratch() as folder:
        with quiet():
            model = GPTQModel.load(str(base.folder), QuantizeConfig(bits=BITS, group_size=64))
            model.quantize(common.calibration(base, 8, SEQLEN), batch_size=common.BATCH_SIZE)
            model.save(str(folder / "model"))
        del model
        for repeat in range(REPEATS):
            for kind in KINDS:
                command = [sys.executable, __file__, kind, str(base.folder), base.calibration, str(folder / "model"),
                           str(folder / f"{kind}-{repeat}")]  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[kind].append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {kind: statistics.median(run["seconds"] for run in runs[kind]) for kind in KINDS}
    memory = {kind: max(run["peak bytes"] for run in runs[kind]) for kind in KINDS}
    return {
        "setup": {"rank": RANK, "bits": BITS, "samples": SAMPLES, "seqlen": SEQLEN},
        "runs": runs,
        "seconds": seconds,
        "times faster": seconds["stock"] / seconds["ours"],
        "peak bytes": memory,
        "memory ratio": memory["ours"] / memory["stock"],
    }


def show(result: dict[str, Any]) -> None:
    """Print where the time goes."""
    names = list(dict.fromkeys(name for kind in KINDS for name in result["runs"][kind][0]["parts"]))
    rows: list[list[Any]] = [
        [name, *(result["runs"][kind][0]["parts"].get(name, 0.0) for kind in KINDS)] for name in names
    ]
    rows.append(["all", *(result["seconds"][kind] for kind in KINDS)])
    rows.append(["peak GB", *(result["peak bytes"][kind] / 1e9 for kind in KINDS)])
    common.table(("seconds (threads added up)", *KINDS), rows)
    print(f"{result['times faster']:.2f} times faster, {result['memory ratio']:.2f} of the memory")


if __name__ == "__main__":
    kind, base, text, checkpoint, folder = sys.argv[1:]
    found = one(kind, common.Subject("", Path(base), calibration=text), Path(checkpoint), Path(folder))
    print(json.dumps(found), file=sys.__stdout__)
