"""Runs the tests of `triton_weight.py` in a process of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..triton_process import assert_passes

pytest.importorskip("triton")


def test_under_the_interpreter() -> None:
    assert_passes(Path(__file__).with_name("triton_weight.py"), interpreted=True)
