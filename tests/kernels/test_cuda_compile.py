"""The compiled CUDA kernels as machine code, without a GPU: nothing spills, and weights take few instructions."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from .cuda.assembled import COMPILER, assembled

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no NVIDIA compiler")

# Of one weight at one row; Triton's GEMV issues 4.4, 5.1 and 3.8 (docs/kernels.md).
MOST_INSTRUCTIONS = {2: 2.7, 3: 3.4, 4: 3.1}


def test_on_hopper() -> None:
    """All architectures: `python -m tests.kernels.cuda.assembled`."""
    made = assembled((9, 0))
    assert {one.name.split("<")[0] for one in made} == {"few_rows", "many_rows"}
    assert [one for one in made if one.spilled] == []
    for bits, most in MOST_INSTRUCTIONS.items():
        counts = [one.per_weight for one in made if one.name.startswith(f"few_rows<{bits}") and one.per_weight]
        assert 0.5 < min(counts) < most
