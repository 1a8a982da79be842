"""Does `quantize(adapter=EoRA(32))` ever hang or crash? Fresh processes, with several counts of GPTQModel's workers.

python benchmarks/stability.py --json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import common

RANK = 32
# A run is over in minutes; a deadlock never is.
LIMIT_SECONDS = 900

RUN = """
import sys
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel_eora_ext import EoRA
sys.path.insert(0, sys.argv[1])
import common
model = GPTQModel.load(sys.argv[2], QuantizeConfig(bits=2, group_size=64))
model.quantize(common.calibration(16, 64), batch_size=8, adapter=EoRA(rank=int(sys.argv[3])))
assert len(model._eora_run.factors) == 7 * model.model.config.num_hidden_layers
"""


def attempt(workers: int, base: Path) -> tuple[str, float]:
    """One fresh process; returns how it ended and after how many seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-c", RUN, str(common.RESULTS.parent), str(base), str(RANK)]
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": str(workers)}
    try:
        code = subprocess.run(command, env=environment, capture_output=True, timeout=LIMIT_SECONDS).returncode
    except subprocess.TimeoutExpired:
        return "hung", time.perf_counter() - start
    return "done" if code == 0 else f"exit {code}", time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--runs", type=int, default=10, help="processes per count of workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=0, help="only the first so many layers; 0 is the whole model")
    options = parser.parse_args()
    runs: list[dict[str, object]] = []
    with common.scratch() as folder:
        base = common.first_layers(folder, options.layers)
        for _ in range(options.runs):
            for workers in options.workers:
                outcome, seconds = attempt(workers, base)
                runs.append({"workers": workers, "outcome": outcome, "seconds": seconds})
    common.keep("stability", {"setup": {"rank": RANK, "layers": options.layers or "all"}, "runs": runs},
                as_json=options.json)  # fmt: skip
    rows = []
    for workers in options.workers:
        outcomes = [run["outcome"] for run in runs if run["workers"] == workers]
        rows.append([workers, outcomes.count("done"), outcomes.count("hung"), len(outcomes)])
    common.table(("workers", "done", "hung", "runs"), rows)


if __name__ == "__main__":
    main()
