"""What do the presets cost: time of `quantize` beside quantising alone, sensitivities measured anew in every run?

With GPTQModel's search for scales, as in `recovery.py`, which tells what the presets win. One process, kinds
interleaved.

    python benchmarks/presets.py --json
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import common
from gptqmodel import GPTQModel, QuantizeConfig

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.adapter.presets import DEFAULT_BUDGET, PRESETS
from gptqmodel_eora_ext.hosts.terminal import quiet

SAMPLES, SEQLEN = 32, 256
BITS, GROUP_SIZE, SCALE_SEARCH = 2, 64, 2.4
PLAIN = "plain"


def quantize(base: common.Subject, kind: str, calibration: list[dict[str, list[int]]]) -> float:
    """Seconds of `quantize` alone; loading and saving cost the same for all."""
    with common.scratch() as folder, quiet():
        os.environ["XDG_CACHE_HOME"] = str(folder)
        adapter = None if kind == PLAIN else EoRA(preset=kind, budget=DEFAULT_BUDGET)
        model = GPTQModel.load(str(base.folder), QuantizeConfig(bits=BITS, group_size=GROUP_SIZE, mse=SCALE_SEARCH))
        start = time.perf_counter()
        model.quantize(calibration, batch_size=common.BATCH_SIZE, adapter=adapter)
        return time.perf_counter() - start


def main() -> None:
    kinds = (PLAIN, *PRESETS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--repeats", type=int, default=2)
    common.add_model(parser)
    options = parser.parse_args()
    with common.subject(options) as base:
        calibration = common.calibration(base, SAMPLES, SEQLEN)
        seconds: dict[str, list[float]] = {kind: [] for kind in options.kinds}
        quantize(base, PLAIN, calibration[:8])  # thread pools and kernels start up once
        for _ in range(options.repeats):
            for kind in options.kinds:
                seconds[kind].append(quantize(base, kind, calibration))
    median = {kind: statistics.median(times) for kind, times in seconds.items()}
    setup = {"samples": SAMPLES, "seqlen": SEQLEN, "bits": BITS, "group_size": GROUP_SIZE, "mse": SCALE_SEARCH,
             "budget": DEFAULT_BUDGET, "layers": options.layers or "all"}  # fmt: skip
    result: dict[str, Any] = {"measured": common.measured(base), "setup": setup, "seconds": seconds}
    result["time ratio"] = {kind: median[kind] / median[PLAIN] for kind in options.kinds}
    common.keep(base.results("presets"), result, as_json=options.json)
    rows = [[kind, median[kind], result["time ratio"][kind]] for kind in options.kinds]
    common.table(("run", "seconds", "ratio"), rows)


if __name__ == "__main__":
    main()
