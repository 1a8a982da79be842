"""What does compensation cost in the quantise loop: wall time and peak memory, beside GPTQModel's own `Lora`?

Times come from one process, kinds interleaved; peak memory from a process each, since it never falls. Either part can
be measured alone; the other's last result stays.

    python benchmarks/cost.py --json
"""

from __future__ import annotations

import argparse
import json
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


def quantize(base: Path, kind: str, calibration: list[dict[str, list[int]]]) -> float:
    """Seconds of `quantize` alone; loading and saving cost the same for all."""
    with common.scratch() as folder, quiet():
        adapter = {"plain": None, "ours": EoRA(rank=RANK), "stock": Lora(rank=RANK, path=str(folder))}[kind]
        model = GPTQModel.load(str(base), QuantizeConfig(bits=2, group_size=64))
        start = time.perf_counter()
        model.quantize(calibration, batch_size=common.BATCH_SIZE, adapter=adapter)
        return time.perf_counter() - start


def high_water_mark() -> int:
    """Largest resident set of this process in bytes. `ru_maxrss` would count the parent's before exec."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def peak_memory(base: Path, kind: str) -> int:
    """Bytes of the largest resident set of a process that does one run."""
    command = [sys.executable, __file__, "--one", kind, "--base", str(base)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=0, help="only the first so many layers; 0 is the whole model")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    calibration = common.calibration(SAMPLES, SEQLEN)
    if options.one:
        quantize(options.base, options.one, calibration)
        print(high_water_mark(), file=sys.__stdout__)
        return

    kept = common.RESULTS / "cost.json"
    result: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    result.pop("environment", None)
    result["setup"] = {"rank": RANK, "samples": SAMPLES, "seqlen": SEQLEN, "bits": 2, "layers": options.layers or "all"}
    with common.scratch() as folder:
        base = common.first_layers(folder / "model", options.layers)
        if "time" in options.parts:
            seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
            quantize(base, "plain", calibration[:8])  # thread pools and kernels start up once
            for _ in range(options.repeats):
                for kind in KINDS:
                    seconds[kind].append(quantize(base, kind, calibration))
            median = {kind: statistics.median(times) for kind, times in seconds.items()}
            result["seconds"] = seconds
            result["time ratio"] = {kind: median[kind] / median["plain"] for kind in KINDS}
        if "memory" in options.parts:
            memory = {kind: peak_memory(base, kind) for kind in KINDS}
            result["peak bytes"] = memory
            result["memory ratio"] = {kind: memory[kind] / memory["plain"] for kind in KINDS}
    common.keep("cost", result, as_json=options.json)
    rows = [
        [
            kind,
            statistics.median(result["seconds"][kind]) if "seconds" in result else "",
            result.get("time ratio", {}).get(kind, ""),
            result["peak bytes"][kind] / 1e9 if "peak bytes" in result else "",
            result.get("memory ratio", {}).get(kind, ""),
        ]
        for kind in KINDS
    ]
    common.table(("run", "seconds", "ratio", "peak GB", "ratio"), rows)


if __name__ == "__main__":
    main()
