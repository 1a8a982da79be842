"""Runs the tests of `triton_kernels.py` in a process of their own: interpreted, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptqmodel_eora_ext.kernels.dispatch import SWITCH, TORCH, TRITON, Choice, choose

from ..triton_process import ROOT, assert_passes

pytest.importorskip("triton")

KERNELS = Path(__file__).with_name("triton_kernels.py")


def test_under_the_interpreter() -> None:
    assert_passes(KERNELS, interpreted=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_this_gpu() -> None:
    assert_passes(KERNELS, interpreted=False)


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
