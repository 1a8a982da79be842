"""Runs the tests of `interpreted.py` where Triton's kernels are interpreted, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptqmodel_eora_ext.kernels.dispatch import SWITCH, TORCH, TRITON, Choice, choose

from ..interpreter import ROOT, assert_passes_interpreted

pytest.importorskip("triton")


def test_under_the_interpreter() -> None:
    assert_passes_interpreted(Path(__file__).with_name("interpreted.py"))


def test_importing_the_kernels_does_not_import_triton() -> None:
    code = "import sys, gptqmodel_eora_ext.kernels.triton; assert 'triton' not in sys.modules"
    environment = {**os.environ, "GPTQMODEL_EORA_EXT_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_dispatch_names_the_kernel_or_the_reason() -> None:
    chosen = choose("cuda", torch.bfloat16, 3, 1)
    assert chosen == Choice(TRITON) and str(chosen) == "triton"
    assert choose("cuda", torch.bfloat16, 3, 1, frozenset({"triton"})).reason == f"triton is off by {SWITCH}"
    assert choose("cuda", torch.float64, 2, 1).path == TORCH
    assert choose("cuda", torch.float16, 5, 1).path == TORCH
    assert "no kernel for xpu" in choose("xpu", torch.float16, 2, 1).reason
