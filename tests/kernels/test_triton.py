"""Runs the tests of `interpreted.py` where Triton's kernels are interpreted, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def test_under_the_interpreter() -> None:
    tests = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_importing_the_kernels_does_not_import_triton() -> None:
    code = "import sys, gptqmodel_eora_ext.kernels.triton; assert 'triton' not in sys.modules"
    environment = {**os.environ, "GPTQMODEL_EORA_EXT_DISABLE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT)
