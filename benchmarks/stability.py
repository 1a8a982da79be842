"""Does `quantize(adapter=EoRA(32))` ever hang or crash? Fresh processes, with several counts of GPTQModel's workers.

python benchmarks/stability.py --json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import common

RANK = 32
# A run is over in minutes; a deadlock never is.
LIMIT_SECONDS = 900

RUN = """
import sys
from pathlib import Path
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel_eora_ext import EoRA
sys.path.insert(0, sys.argv[1])
import common
model = common.Subject("", Path(sys.argv[2]), calibration=sys.argv[4])
windows = common.calibration(model, 16, 64)
model = GPTQModel.load(str(model.folder), QuantizeConfig(bits=2, group_size=64))
model.quantize(windows, batch_size=8, adapter=EoRA(rank=int(sys.argv[3])))
assert len(model._eora_run.factors) == 7 * model.model.config.num_hidden_layers
"""


def attempt(workers: int, model: common.Subject) -> tuple[str, float]:
    """One fresh process; returns how it ended and after how many seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-c", RUN, str(common.RESULTS.parent), str(model.folder), str(RANK), model.calibration]
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
    common.add_model(parser)
    options = parser.parse_args()
    runs: list[dict[str, object]] = []
    with common.subject(options) as model:
        for _ in range(options.runs):
            for workers in options.workers:
                outcome, seconds = attempt(workers, model)
                runs.append({"workers": workers, "outcome": outcome, "seconds": seconds})
    setup = {"rank": RANK, "layers": options.layers or "all"}
    result = {"measured": common.measured(model), "setup": setup, "runs": runs}
    common.keep(model.results("stability"), result, as_json=options.json)
    rows = []
    for workers in options.workers:
        outcomes = [run["outcome"] for run in runs if run["workers"] == workers]
        rows.append([workers, outcomes.count("done"), outcomes.count("hung"), len(outcomes)])
    common.table(("workers", "done", "hung", "runs"), rows)


if __name__ == "__main__":
    main()
