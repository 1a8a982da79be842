"""The Triton kernels against the oracle: run by `test_triton.py` in a process of its own.

python -m pytest tests/kernels/triton_kernels.py                        on a GPU
TRITON_INTERPRET=1 python -m pytest tests/kernels/triton_kernels.py     anywhere, by Triton's interpreter
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton import knobs
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from gptqmodel_eora_ext.formats.factors import Factors
from gptqmodel_eora_ext.formats.packed_weights import LayoutError, PackedWeight
from gptqmodel_eora_ext.kernels.reference import linear, parts_of
from gptqmodel_eora_ext.kernels.triton import adding, ops, settings
from gptqmodel_eora_ext.kernels.triton.adding import add_correction
from gptqmodel_eora_ext.kernels.triton.correction import COUNTERS, _counters, counters
from gptqmodel_eora_ext.kernels.triton.ops import StackedLinears

from .on_device import DEVICE, packed_weight, random_factors, random_input

# Largest relative error of y, ‖y − ŷ‖ / ‖ŷ‖: float32 sums; half a unit in the last place of y, of Ŵ and of t where
# they are rounded; the interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 1.5e-2}
GROUP_SIZES = (16, 32, 64, 128, 1024, -1)
# in × out: multiples of tiles, of nothing, and smaller than a tile.
SHAPES = ((128, 64), (201, 37), (72, 130), (33, 5))
# A tile of rows, more, and so many that the weight is made dense.
MANY_ROWS = (2, 17, 70)
RANKS = (None, 1, 16, 21)
DTYPES = tuple(TOLERANCE)


@pytest.fixture(autouse=True, scope="module")
def bfloat16_dots() -> Any:
    """Triton 3.8's interpreter keeps bfloat16 as integers and multiplies those in `dot`; give it their values."""
    if not knobs.runtime.interpret:
        yield
        return
    create_dot = InterpreterBuilder.create_dot

    def widened(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def fixed(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return create_dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = fixed
    yield
    InterpreterBuilder.create_dot = create_dot


def matrix() -> list[Any]:
    """Bits × group sizes × one row or more in full; everything else is drawn for each."""
    cases = []
    generator = random.Random(0)
    drawn = (SHAPES, RANKS, DTYPES, (16, 8, 4), (True, False), (False, True), (False, True))
    for bits, group_size, several in itertools.product((2, 3, 4, 8), GROUP_SIZES, (False, True)):
        rows = generator.choice(MANY_ROWS) if several else 1
        # One group has no order.
        desc_act = 0 < group_size < 1024 and generator.choice((False, True))
        case = (bits, group_size, rows, desc_act, *(generator.choice(values) for values in drawn))
        cases.append(pytest.param(*case, id="-".join(map(str, case)).replace("torch.", "")))
    return cases


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def oracle(x: torch.Tensor, weight: PackedWeight, factors: Factors | None, bias: torch.Tensor | None) -> torch.Tensor:
    return linear(x.double(), weight, factors, bias, accumulate=torch.float64)


@pytest.mark.parametrize(
    ("bits", "group_size", "rows", "desc_act", "shape", "rank", "dtype", "factor_bits", "sym", "version_1", "bias"),
    matrix(),
)
def test_one_module(
    bits: int,
    group_size: int,
    rows: int,
    desc_act: bool,
    shape: tuple[int, int],
    rank: int | None,
    dtype: torch.dtype,
    factor_bits: int,
    sym: bool,
    version_1: bool,
    bias: bool,
) -> None:
    in_features, out_features = shape
    weight = packed_weight(bits, out_features, in_features, group_size, sym=sym, desc_act=desc_act, version_1=version_1)
    factors = random_factors(weight, rank, factor_bits) if rank else None
    added = torch.linspace(-1, 1, out_features, device=DEVICE).to(dtype) if bias else None
    x = random_input(rows, in_features, dtype)
    (y,) = StackedLinears.prepare([weight], [factors], [added])(x)
    assert y.shape == (rows, out_features) and y.dtype == dtype
    assert error(y, oracle(x, weight, factors, added)) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 5])
def test_the_largest_rank(rows: int) -> None:
    weight = packed_weight(3, 40, 64, 16, sym=False)
    factors = random_factors(weight, 1024)
    x = random_input(rows, 64)
    (y,) = StackedLinears.prepare([weight], [factors], [None])(x)
    assert error(y, oracle(x, weight, factors, None)) < TOLERANCE[torch.float32]


def stacked(bits: int = 2, ranks: tuple[int | None, ...] = (5, None, 18)) -> tuple[Any, Any, Any]:
    """Three modules of different widths that read the same input."""
    weights = [packed_weight(bits, out, 200, 32, sym=False, seed=out) for out in (70, 130, 9)]
    factors = [random_factors(one, rank, seed=7) if rank else None for one, rank in zip(weights, ranks, strict=True)]
    return weights, factors, [torch.ones(70, device=DEVICE), None, torch.ones(9, device=DEVICE)]


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("ranks", [(5, None, 18), (None, None, None), (1, 1, 1)])
def test_modules_that_share_an_input(rows: int, bits: int, ranks: tuple[int | None, ...]) -> None:
    weights, factors, biases = stacked(bits, ranks)
    x = random_input(rows, 200)
    ys = StackedLinears.prepare(weights, factors, biases)(x.reshape(rows, 1, 200))
    for y, weight, pair, bias in zip(ys, weights, factors, biases, strict=True):
        assert y.shape == (rows, 1, weight.out_features)
        assert error(y.reshape(rows, -1), oracle(x, weight, pair, bias)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("rows", "out_features"), [(1, 500), (6, 40), (40, 40)])
def test_split_inputs_or_not(rows: int, out_features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One processor needs no splits, many need them; 40 rows are several tiles."""
    weight = packed_weight(2, out_features, 264, 64, sym=False)
    factors = random_factors(weight, 20)
    fused = StackedLinears.prepare([weight], [factors], [None])
    x = random_input(rows, 264)
    expected = oracle(x, weight, factors, None)
    found = set()
    for processors in (1, 64):
        monkeypatch.setattr(ops, "processors", lambda device, processors=processors: processors)
        if rows == 1:
            found.add(settings.gemv((out_features,), 264, 2, False, processors).splits)
        else:
            found.add(settings.gemm(rows, (out_features,), 264, 64, x.dtype, processors).splits)
        (y,) = fused(x)
        assert error(y, expected) < TOLERANCE[torch.float32]
        assert torch.equal(y, fused(x)[0])
    assert min(found) == 1 < max(found)


def correction(rows: int, rank: int, in_features: int, out: int, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
    """x, A, Bᵀ, another kernel's y, and what it is to become."""
    weight = packed_weight(4, out, in_features, 64)
    factors = random_factors(weight, rank)
    down, up = (one.to(dtype) for one in factors.dense())
    x = random_input(rows, in_features, dtype, seed=seed)
    y = random_input(rows, out, dtype, seed=seed + 5)
    return x, down, up, y, y.double() + (x.double() @ down.double().T) @ up.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, settings.MOST_CORRECTION_ROWS, 70])
@pytest.mark.parametrize(
    ("rank", "in_features", "out"),
    [(21, 201, 130), (1, 33, 5), (64, 600, 40), (128, 64, 64), (150, 64, 64)],
)
def test_correction_of_another_kernels_output(
    dtype: torch.dtype, rows: int, rank: int, in_features: int, out: int
) -> None:
    x, down, up, y, expected = correction(rows, rank, in_features, out, dtype)
    add_correction(x, down, up, y, slot=3)
    assert error(y, expected) < TOLERANCE[dtype]


def test_correction_again_and_again() -> None:
    """Each launch counts on from where the last one left its counter, also where the counter wraps around."""
    bank = counters(torch.zeros(1, device=DEVICE).device)
    assert bank is not None
    programs = settings.programs(adding.at_once(bank.device))
    bank[7] = 2**31 - programs
    # Unaligned tensors take another variant than the one that is known.
    for seed, shift in enumerate((0, 0, 1, 0)):
        x, down, up, y, expected = correction(1, 9, 200, 70, torch.float32, seed)
        x = torch.cat([x.new_zeros(1, shift), x], 1)[:, shift:]
        add_correction(x, down, up, y, slot=7 + COUNTERS)
        assert error(y, expected) < TOLERANCE[torch.float32]
    assert int(bank[7]) == -(2**31) + 3 * programs


def test_correction_takes_any_shape_of_the_rows() -> None:
    x, down, up, _, _ = correction(6, 4, 64, 20, torch.float32)
    flat, shaped = torch.zeros(6, 20, device=DEVICE), torch.zeros(2, 3, 20, device=DEVICE)
    add_correction(x, down, up, flat, slot=0)
    add_correction(x.reshape(2, 3, 64), down, up, shaped, slot=0)
    assert torch.equal(flat, shaped.reshape(6, 20)) and flat.abs().max() > 0
    nothing = torch.zeros(0, 20, device=DEVICE)
    add_correction(torch.zeros(0, 64, device=DEVICE), down, up, nothing, slot=0)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_correction_in_a_graph() -> None:
    """The first call on a device may be a captured one; its replays compute anew."""
    x, down, up, y, expected = correction(2, 64, 4096, 4096, torch.float16)
    base = y.clone()
    for known in (False, True):
        if known:
            add_correction(x, down, up, base.clone(), slot=11)
        else:
            _counters.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            add_correction(x, down, up, y, slot=11)
        for _ in range(3):
            y.copy_(base)
            graph.replay()
            assert error(y, expected) < TOLERANCE[torch.float16]


def test_no_rows() -> None:
    weights, factors, biases = stacked()
    ys = StackedLinears.prepare(weights, factors, biases)(torch.zeros(0, 200, device=DEVICE))
    assert [tuple(y.shape) for y in ys] == [(0, 70), (0, 130), (0, 9)]


def test_weights_are_not_copied() -> None:
    weights, factors, biases = stacked()
    fused = StackedLinears.prepare(weights, factors, biases)
    for weight, qweight, scales in zip(weights, fused.qweights, fused.scales, strict=True):
        assert qweight.data_ptr() == weight.qweight.data_ptr() and scales.data_ptr() == weight.scales.data_ptr()


@pytest.mark.parametrize("rows", [1, 6])
def test_operators_as_torch_wants_them(rows: int) -> None:
    """Schema, fake implementation (dtype, shape, no hidden mutation) and tracing, by torch's own checker."""
    weights, factors, biases = stacked()
    fused = StackedLinears.prepare(weights, factors, biases)
    x = random_input(rows, 200)
    arguments = (
        x, fused.qweights, fused.qzeros, fused.scales, fused.g_idx, fused.biases, fused.down, fused.down_scales,
        fused.ups, fused.up_scales, fused.bits, fused.group_size, fused.factor_bits, fused.key,
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.fused_linears, arguments, test_utils=checks)


def test_compiled_without_a_graph_break() -> None:
    weights, factors, biases = stacked()
    fused = StackedLinears.prepare(weights, factors, biases)

    def model(x: torch.Tensor) -> torch.Tensor:
        return fused(x)[0].relu()

    x = random_input(3, 200)
    expected = model(x)
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(found, expected)


def test_modules_that_cannot_share_a_launch() -> None:
    two, four = packed_weight(2, 8, 64, 32), packed_weight(4, 8, 64, 32)
    with pytest.raises(LayoutError, match="differ in"):
        StackedLinears.prepare([two, four], [None, None], [None, None])
    with pytest.raises(LayoutError, match="differ in their factors"):
        StackedLinears.prepare([two, two], [random_factors(two, 4), random_factors(two, 4, 8)], [None, None])
    with pytest.raises(LayoutError, match="made for another model"):
        StackedLinears.prepare([two], [random_factors(packed_weight(2, 9, 64, 32), 4)], [None])


MEMBERS = (7, 0, 5, 9)


def members_and_weights(rows: int, factor_bits: int = 16, absent: int = 2) -> tuple[PackedWeight, Factors, Any]:
    """An ensemble's factors and weights of a batch; one member, all of whose numbers are NaN, has none in any row."""
    weight = packed_weight(2, 70, 200, 32)
    factors = random_factors(weight, sum(MEMBERS), factor_bits)
    part = parts_of(MEMBERS)[absent]
    for one in (factors.down, factors.up):
        (one if isinstance(one, torch.Tensor) else one.scales)[part] = float("nan")
    weights = random_input(rows, len(MEMBERS), torch.float32, seed=5).abs()
    weights[:, 0], weights[:, absent] = 1.0, 0.0
    return weight, replace(factors, members=MEMBERS), weights


@pytest.mark.parametrize("factor_bits", [16, 4])
@pytest.mark.parametrize("rows", [1, 5])
def test_weights_of_members(rows: int, factor_bits: int) -> None:
    """Of each row, in launches that modules share; a member without weight is not read."""
    weight, factors, weights = members_and_weights(rows, factor_bits)
    x = random_input(rows, 200)
    ys = StackedLinears.prepare([weight, weight], [factors, None], [None, None])(x, weights)
    for y, pair in zip(ys, (factors, None), strict=True):
        expected = linear(x.double(), weight, pair, weights=weights, accumulate=torch.float64)
        assert error(y, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("rows", [1, 5])
def test_weights_of_members_on_another_kernels_output(rows: int) -> None:
    weight, factors, weights = members_and_weights(rows)
    x, y = random_input(rows, 200), torch.zeros(rows, 70, device=DEVICE)
    down, up = factors.dense()
    owners = torch.arange(len(MEMBERS), device=DEVICE, dtype=torch.int32)
    owners = owners.repeat_interleave(torch.tensor(MEMBERS, device=DEVICE))
    add_correction(x, down.contiguous(), up.contiguous(), y, 0, weights, owners)
    with_members = linear(x.double(), weight, factors, weights=weights, accumulate=torch.float64)
    expected = with_members - linear(x.double(), weight, accumulate=torch.float64)
    assert error(y, expected) < TOLERANCE[torch.float32]
