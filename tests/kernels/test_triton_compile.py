"""The shipped kernels compile for GPUs that are not here, spill no registers, and fit their shared memory."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from gptqmodel_eora_ext.kernels.triton.settings import MOST_FUSED_ROWS

from .compiled import TARGETS, Case, build

# Hopper, whose tensor cores are fed otherwise, the newest NVIDIA target and AMD's; below, the oldest. All targets and
# settings: `python -m tests.kernels.compiled`.
ARCHITECTURES = (90, 120, "gfx942")
CASES = (
    Case(bits=2, rows=1, outs=(1024, 256, 256)),
    Case(bits=3, rows=1, factor_bits=4),
    Case(bits=2, rows=16),
    Case(bits=4, rows=64),
    Case(bits=2, rows=64, in_features=1000, sym=True),
    Case(bits=4, rows=512),
    Case(bits=None, rows=1, in_features=4096, outs=(12288,)),
    Case(bits=None, rows=16, in_features=4096, outs=(12288,)),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_spills_and_all_fits(case: Case) -> None:
    launches = case.launches()
    # Of many rows, the weight is made dense and the rest left to the vendor's products.
    assert len(launches) == (1 if case.bits is None or case.rows > MOST_FUSED_ROWS else 2)
    for kernel, args, options in launches:
        for target, shared in TARGETS.items():
            if target.arch in ARCHITECTURES:
                made = build(kernel, args, options, target)
                assert made.spilled == 0, f"{made.kernel} spills {made.spilled} bytes on {target.arch}"
                assert made.shared <= shared, (
                    f"{made.kernel} takes {made.shared} bytes of shared memory on {target.arch}"
                )
                assert made.registers > 0


def test_tensor_cores_where_there_are_rows_enough() -> None:
    def assembly(rows: int, index: int) -> Any:
        kernel, args, options = Case(bits=2, rows=rows).launches()[index]
        return build(kernel, args, options, next(iter(TARGETS))).assembly

    for index in (0, 1):
        assert "mma.sync" in assembly(16, index)
        assert "mma.sync" not in assembly(1, index)
