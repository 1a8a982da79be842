"""NVIDIA's compiled kernels against the oracle, on the CPU: their own sources, with NVIDIA's instructions emulated."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.formats.factors import Factors
from gptqmodel_eora_ext.formats.packed_weights import PackedWeight
from gptqmodel_eora_ext.kernels.cuda import few_rows, many_rows
from gptqmodel_eora_ext.kernels.cuda.few_rows import FewRows
from gptqmodel_eora_ext.kernels.cuda.many_rows import ManyRows
from gptqmodel_eora_ext.kernels.cuda.structures import UNIT_CODES
from gptqmodel_eora_ext.kernels.cuda.workspaces import CAPTURED
from gptqmodel_eora_ext.kernels.reference import linear, parts_of

from .cases import packed_weight, random_factors, random_input
from .cuda import emulation

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(shutil.which(emulation.COMPILER) is None, reason="no C++ compiler")

# ‖y − ŷ‖ / ‖ŷ‖: half a unit in the last place of y; where Ŵ and t are rounded, of these too.
TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 3e-3}
ROUNDED = {torch.float16: 6e-4, torch.bfloat16: 5e-3}
# in × outs of modules: whole tiles, and tiles that end early.
SHAPES = ((256, (64,)), (576, (40, 72)), (1088, (136, 8, 8)), (96, (200, 16)))
RANKS = (None, 1, 20, 64, 70)


def stacked(
    bits: int, outs: Sequence[int], in_features: int, group_size: int, ranks: Sequence[int | None], *,
    factor_bits: int = 16, sym: bool = True, biased: bool = False,
) -> Any:  # fmt: skip
    from gptqmodel_eora_ext.kernels.triton.ops import StackedLinears

    weights = [packed_weight(bits, out, in_features, group_size, sym=sym, seed=out) for out in outs]
    factors = [
        random_factors(weight, rank, factor_bits, seed=3) if rank else None
        for weight, rank in zip(weights, ranks, strict=True)
    ]
    biases = [torch.linspace(-1, 1, out) if biased else None for out in outs]
    return StackedLinears.prepare(weights, factors, biases), weights, factors, biases


def oracle(
    x: torch.Tensor, weight: PackedWeight, factors: Factors | None, bias: torch.Tensor | None, **options: Any
) -> torch.Tensor:
    return linear(
        x.double(), weight, factors, None if bias is None else bias.double(), accumulate=torch.float64, **options
    )


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def cases(rows: Sequence[int], group_sizes: Sequence[int], count: int) -> list[Any]:
    """Bits × group sizes in full, all else drawn for each."""
    drawn = (SHAPES, RANKS, (16, 8, 4), (torch.float16, torch.bfloat16), (True, False), (True, False), rows)
    generator = random.Random(0)
    made = []
    for bits, group_size, _ in itertools.product((2, 3, 4), group_sizes, range(count)):
        case = (bits, group_size, *(generator.choice(values) for values in drawn))
        made.append(pytest.param(*case, id="-".join(map(str, case)).replace("torch.", "")))
    return made


@pytest.mark.parametrize(
    ("bits", "group_size", "shape", "rank", "factor_bits", "dtype", "sym", "biased", "rows"),
    cases((1, 1, 2, 8, 9, 16), (32, 64, 128, 512, -1), 2),
)
def test_few_rows(
    bits: int, group_size: int, shape: tuple[int, tuple[int, ...]], rank: int | None, factor_bits: int,
    dtype: torch.dtype, sym: bool, biased: bool, rows: int,
) -> None:  # fmt: skip
    """Twice: the first launch leaves the counters as the second needs them. A module may lack an adapter."""
    in_features, outs = shape
    ranks = [rank, *(None if index == 0 else rank for index in range(len(outs) - 1))]
    made, *modules = stacked(
        bits, outs, in_features, group_size, ranks, factor_bits=factor_bits, sym=sym, biased=biased
    )
    x = random_input(rows, in_features, dtype)
    if not few_rows.serves(made):
        # Groups of fewer inputs than a step has, or units that the inputs end within: Triton's.
        inputs = 4 * UNIT_CODES[bits]
        assert group_size < min(inputs, in_features) or in_features % UNIT_CODES[bits]
        return
    launch = FewRows(made, emulation.device())
    for _ in range(2):
        ys = launch(x.reshape(1, rows, in_features))
        assert ys is not None
        for y, weight, pair, bias in zip(ys, *modules, strict=True):
            assert y.shape == (1, rows, weight.out_features)
            assert error(y.reshape(rows, -1), oracle(x, weight, pair, bias)) < TOLERANCE[dtype]
    workspace = launch._workspaces.at(0, x.device)
    assert workspace is not None and not workspace[: few_rows.COUNTERS].any()


@pytest.mark.parametrize("processors", [1, 6, 200])
@pytest.mark.parametrize("rows", [1, 5])
def test_few_rows_however_they_are_cut(processors: int, rows: int) -> None:
    """One adapter warp for several tiles or several for one; little memory leaves few warps."""
    made, *modules = stacked(2, (64, 72), 2048, 64, (64, 20))
    x = random_input(rows, 2048, torch.bfloat16)
    expected = [oracle(x, *module) for module in zip(*modules, strict=True)]
    for memory in (emulation.MEMORY, 48 * 1024):
        ys = FewRows(made, emulation.device(processors, memory))(x)
        assert ys is not None
        assert all(error(y, right) < TOLERANCE[x.dtype] for y, right in zip(ys, expected, strict=True))


def test_the_same_call_gives_the_same_bits() -> None:
    made, *_ = stacked(3, (136,), 1024, 128, (64,))
    launch = FewRows(made, emulation.device())
    x = random_input(2, 1024, torch.float16)
    first, second = launch(x), launch(x)
    assert first is not None and second is not None and torch.equal(first[0], second[0])


MEMBERS = (7, 0, 5, 9)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("factor_bits", [16, 4])
def test_weights_of_members(rows: int, factor_bits: int) -> None:
    """Of each row; a member without weight, all of whose numbers are NaN, is not read."""
    made, (weight,), (factors,), _ = stacked(2, (72,), 256, 64, (sum(MEMBERS),), factor_bits=factor_bits)
    absent = parts_of(MEMBERS)[2]
    for one in (factors.down, factors.up):
        (one if isinstance(one, torch.Tensor) else one.scales)[absent] = float("nan")
    factors = replace(factors, members=MEMBERS)
    weights = random_input(rows, len(MEMBERS), torch.float32, seed=5).abs()
    weights[:, 0], weights[:, 2] = 1.0, 0.0
    made = type(made).prepare([weight], [factors], [None])
    x = random_input(rows, 256, torch.bfloat16)
    ys = FewRows(made, emulation.device())(x, weights)
    assert ys is not None and error(ys[0], oracle(x, weight, factors, None, weights=weights)) < TOLERANCE[x.dtype]


def test_what_few_rows_leave_to_others() -> None:
    made, *_ = stacked(2, (64,), 256, 64, (8,))
    launch = FewRows(made, emulation.device())
    assert launch(random_input(17, 256, torch.float16)) is None
    assert launch(random_input(1, 256, torch.float32)) is None
    assert launch(random_input(0, 256, torch.float16)) is None
    assert launch(random_input(1, 257, torch.float16)[:, 1:]) is None
    assert launch(random_input(256, 1, torch.float16).T.expand(2, 256)) is None
    assert not few_rows.serves(stacked(8, (64,), 256, 64, (8,))[0])
    assert not few_rows.serves(stacked(2, (60,), 256, 64, (8,))[0])
    assert FewRows(made, emulation.device(memory=1024))(random_input(1, 256, torch.float16)) is None


def test_a_graph_that_is_the_first_to_launch_has_no_workspace() -> None:
    launch = FewRows(stacked(2, (64,), 256, 64, (8,))[0], emulation.device())
    cpu = torch.device("cpu")
    assert launch._workspaces.at(CAPTURED, cpu) is None
    launch(random_input(1, 256, torch.float16))
    captured, usual = launch._workspaces.at(CAPTURED, cpu), launch._workspaces.at(0, cpu)
    assert captured is not None and usual is not None and captured.data_ptr() != usual.data_ptr()


@pytest.mark.parametrize(
    ("bits", "group_size", "shape", "rank", "factor_bits", "dtype", "sym", "biased", "rows"),
    cases((17, 64, 70), (16, 32, 64, 128, -1), 1),
)
def test_many_rows(
    bits: int, group_size: int, shape: tuple[int, tuple[int, ...]], rank: int | None, factor_bits: int,
    dtype: torch.dtype, sym: bool, biased: bool, rows: int,
) -> None:  # fmt: skip
    in_features, outs = shape
    made, *modules = stacked(
        bits, outs, in_features, group_size, [rank] * len(outs), factor_bits=factor_bits, sym=sym, biased=biased
    )
    if not many_rows.serves(made):
        # Such groups are looked up, input by input.
        assert (bits, group_size) == (3, 16)
        return
    check_many_rows(made, modules, random_input(rows, in_features, dtype), emulation.PROCESSORS)


def check_many_rows(made: Any, modules: Any, x: torch.Tensor, processors: int) -> None:
    pairs = [pair for pair in modules[1] if pair is not None]
    t = torch.cat([(x.double() @ pair.dense(torch.float64)[0].T).to(x.dtype) for pair in pairs], 1) if pairs else None
    launch = ManyRows(made, emulation.device(processors))
    for _ in range(2):
        ys = launch(x, t)
        assert ys is not None
        for y, weight, pair, bias in zip(ys, *modules, strict=True):
            assert error(y, oracle(x, weight, pair, bias)) < ROUNDED[x.dtype]
    counters = launch._workspaces.at(0, x.device)
    assert counters is not None and not counters.any()


def test_many_rows_that_split_the_inputs() -> None:
    made, *modules = stacked(3, (136,), 2080, 32, (20,), sym=False)
    x = random_input(20, 2080, torch.bfloat16)
    assert many_rows.plan(made, 20, x.dtype, 12).splits == 4
    check_many_rows(made, modules, x, 12)


def test_what_many_rows_leave_to_others() -> None:
    made, *_ = stacked(2, (64,), 256, 64, (None,))
    launch = ManyRows(made, emulation.device())
    assert launch(random_input(20, 256, torch.float32), None) is None
    assert many_rows.group_cut(96, 1024) is None and many_rows.group_cut(8, 1024) is None
    assert not many_rows.serves(stacked(2, (64,), 480, 96, (None,))[0])
