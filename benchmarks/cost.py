"""What does compensation cost in the quantise loop: wall time and peak memory, beside GPTQModel's own `Lora`?

Times come from one process, kinds interleaved; peak memory from a process each, since it never falls. Either part can
be measured alone; the other's last result stays.

    python benchmarks/cost.py --json
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import Lora

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.hosts.terminal import quiet

RANK = 32
SAMPLES, SEQLEN = 64, 256
KINDS = ("plain", "ours", "stock")
PARTS = ("time", "memory")


def quantize(base: common.Subject, kind: str, calibration: list[dict[str, list[int]]]) -> float:
    """Seconds of `quantize` alone; loading and saving cost the same for all."""
    with common.scratch() as folder, quiet():
        adapter = {"plain": None, "ours": EoRA(rank=RANK), "stock": Lora(rank=RANK, path=str(folder))}[kind]
        model = GPTQModel.load(str(base.folder), QuantizeConfig(bits=2, group_size=64))
        start = time.perf_counter()
        model.quantize(calibration, batch_size=common.BATCH_SIZE, adapter=adapter)
        return time.perf_counter() - start


def high_water_mark() -> int:
    """Largest resident set of this process in bytes. `ru_maxrss` would count the parent's before exec."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def peak_memory(base: common.Subject, kind: str) -> int:
    """Bytes of the largest resident set of a process that does one run."""
    command = [sys.executable, __file__, "--one", kind, "--model", str(base.folder), "--calibration", base.calibration]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    common.add_model(parser)
    options = parser.parse_args()
    with common.subject(options) as base:
        calibration = common.calibration(base, SAMPLES, SEQLEN)
        if options.one:
            quantize(base, options.one, calibration)
            print(high_water_mark(), file=sys.__stdout__)
            return

        result = common.kept(base.results("cost"))
        setup = {"rank": RANK, "samples": SAMPLES, "seqlen": SEQLEN, "bits": 2, "layers": options.layers or "all"}
        if "time" in options.parts:
            seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
            quantize(base, "plain", calibration[:8])  # thread pools and kernels start up once
            for _ in range(options.repeats):
                for kind in KINDS:
                    seconds[kind].append(quantize(base, kind, calibration))
            median = {kind: statistics.median(times) for kind, times in seconds.items()}
            ratio = {kind: median[kind] / median["plain"] for kind in KINDS}
            result["time"] = {"measured": common.measured(base), "setup": setup, "seconds": seconds, "ratio": ratio}
        if "memory" in options.parts:
            memory = {kind: peak_memory(base, kind) for kind in KINDS}
            ratio = {kind: memory[kind] / memory["plain"] for kind in KINDS}
            result["memory"] = {"measured": common.measured(base), "setup": setup, "peak bytes": memory, "ratio": ratio}
    common.keep(base.results("cost"), result, as_json=options.json)
    rows: list[list[Any]] = [[kind] for kind in KINDS]
    for part, found in (("time", "seconds"), ("memory", "peak bytes")):
        for row, kind in zip(rows, KINDS, strict=True):
            if part in result:
                value = result[part][found][kind]
                row += [statistics.median(value) if part == "time" else value / 1e9, result[part]["ratio"][kind]]
            else:
                row += ["", ""]
    common.table(("run", "seconds", "ratio", "peak GB", "ratio"), rows)


if __name__ == "__main__":
    main()
