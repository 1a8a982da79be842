"""Runs tests of Triton's kernels in a process of their own: Triton decides once whether it interprets kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def assert_passes(tests: Path, *, interpreted: bool) -> None:
    """Run a file of tests under Triton's interpreter, or on the GPU of this machine."""
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted))}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
