"""Runs steps of `steps.py` on tiny models, a process each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Steps = Callable[[Path, str, Sequence[str]], None]


@pytest.fixture(scope="session")
def run_step() -> Steps:
    """Runs a step on models of types in a folder."""

    def run(folder: Path, step: str, model_types: Sequence[str]) -> None:
        added = {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        if step == "without":
            added["GPTQMODEL_EORA_EXT_DISABLE"] = "1"
        done = subprocess.run(
            [sys.executable, "-m", "tests.families", step, str(folder), *model_types],
            cwd=ROOT, env={**os.environ, **added}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        print(done.stdout)

    return run
