"""What does the plugin add to the start of each Python process?

python benchmarks/autoload.py --json
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

import common

# The line of `gptqmodel_eora_ext.pth`, in a process that has imported nothing but what Python does.
OURS = """
import sys
import time
for name in [name for name in sys.modules if name.startswith("gptqmodel_eora_ext")]:
    del sys.modules[name]
start = time.perf_counter()
from gptqmodel_eora_ext.autoload import autoload
autoload()
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    seconds = [
        float(subprocess.run([sys.executable, "-c", OURS], capture_output=True, text=True, check=True).stdout)
        for _ in range(options.repeats)
    ]
    milliseconds = {"median": 1e3 * statistics.median(seconds), "largest": 1e3 * max(seconds)}
    result = {"measured": common.measured(), "milliseconds": milliseconds}
    common.keep(common.RESULTS / "autoload.json", result, as_json=options.json)
    common.table(("", "milliseconds"), list(milliseconds.items()))


if __name__ == "__main__":
    main()
