"""The CPU kernels against the oracle in float64, on every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.formats.factors import Factors
from gptqmodel_eora_ext.formats.packed_weights import PackedWeight
from gptqmodel_eora_ext.kernels.cpu.build import ISAS, best_isa, library
from gptqmodel_eora_ext.kernels.cpu.factors import repack_factors
from gptqmodel_eora_ext.kernels.cpu.linear import CODES_ROWS, MATMUL_ROWS, CpuLinear, CpuLinears
from gptqmodel_eora_ext.kernels.cpu.repack import repack_weight
from gptqmodel_eora_ext.kernels.reference import dequantize, linear
from tests.kernels.cases import packed_weight, random_factors, random_input

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")
HERE = range(best_isa() + 1) if library() else range(0)
HAS_BF16 = library() is not None and ISAS[best_isa()] == "avx512-bf16"
# Relative error of the whole output, some of whose numbers are small by cancellation. The input's digits add less than
# the output's rounding: 2^-9 of each number in bfloat16, 2^-12 in float16. `matmul` rounds Ŵ, A, B and x Aᵀ as well.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}
MATMUL_TOLERANCE = 5e-3
# Roundings of a float32 sum that may fall to the same side, as a share of the sum of its terms' sizes.
ROUNDINGS = 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take most of the time; `test_any_shape` uses two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def prepared(weight: PackedWeight, factors: Factors | None = None, bias: torch.Tensor | None = None) -> CpuLinear:
    return CpuLinear(repack_weight(weight), None if factors is None else repack_factors(factors), bias)


def codes(layer: CpuLinear, x: torch.Tensor, isa: int) -> torch.Tensor:
    return CpuLinears([layer]).codes(x, isa)


def tiles(layer: CpuLinear, x: torch.Tensor, isa: int) -> torch.Tensor:
    return CpuLinears([layer]).tiles(x, isa)


def matmul(layer: CpuLinear, x: torch.Tensor) -> torch.Tensor:
    return CpuLinears([layer]).matmul(x)


@pytest.mark.parametrize("isa", HERE, ids=lambda isa: ISAS[isa])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size", "sym", "desc_act", "rank", "factor_bits"),
    [
        (48, 128, 32, True, False, 0, 16),
        (40, 100, 16, False, True, 5, 16),
        (17, 250, -1, False, False, 1, 8),
        (33, 96, 48, True, False, 96, 4),
        (5, 2100, 1024, False, False, 20, 8),
    ],
)
def test_as_the_oracle(
    isa: int,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    sym: bool,
    desc_act: bool,
    rank: int,
    factor_bits: int,
) -> None:
    weight = packed_weight(bits, out_features, in_features, group_size, sym=sym, desc_act=desc_act)
    factors = random_factors(weight, rank, factor_bits) if rank else None
    bias = torch.randn(out_features, generator=torch.Generator().manual_seed(3))
    layer = prepared(weight, factors, bias)
    for dtype, tolerance in TOLERANCE.items():
        for rows in (1, 6):
            x = random_input(rows, in_features, dtype)
            expected = linear(x.double(), weight, factors, bias, accumulate=torch.float64)
            assert error(codes(layer, x, isa), expected) < tolerance
            assert error(tiles(layer, x, isa), expected) < tolerance
            if dtype == torch.bfloat16 and ISAS[isa] == "avx512-bf16":
                assert error(matmul(layer, x), expected) < MATMUL_TOLERANCE


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 200),
    group_size=st.sampled_from([-1, 16, 24, 32, 128]),
    desc_act=st.booleans(),
    rank=st.integers(0, 9),
    rows=st.integers(1, 29),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_any_shape(
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    desc_act: bool,
    rank: int,
    rows: int,
    dtype: torch.dtype,
) -> None:
    weight = packed_weight(bits, out_features, in_features, group_size, sym=False, desc_act=desc_act)
    factors = random_factors(weight, rank) if rank else None
    torch.set_num_threads(2)
    layer, x = prepared(weight, factors), random_input(rows, in_features, dtype)
    expected = linear(x.double(), weight, factors, accumulate=torch.float64)
    tolerance = allowed(x, weight, factors) + torch.finfo(dtype).eps * expected.abs()
    for y in (codes(layer, x, best_isa()), tiles(layer, x, best_isa())):
        assert bool(((y.double() - expected).abs() <= tolerance).all())


def allowed(x: torch.Tensor, weight: PackedWeight, factors: Factors | None = None) -> torch.Tensor:
    """The error that each output may have before it is rounded: rows × out.

    An input may be off by 2^-23 (float32) or 2^-15 of its group's largest; sums are float32.
    """
    sizes, dense = x.double().abs(), dequantize(weight, torch.float64).abs()
    terms = sizes @ dense.T
    if factors is not None:
        down, up = factors.dense(torch.float64)
        terms += sizes @ (down.T.abs() @ up.abs())
    group = weight.group_of_input().expand(len(x), -1)
    largest = torch.zeros(len(x), weight.groups, dtype=torch.float64).scatter_reduce_(1, group, sizes, "amax")
    step = 2.0 ** (-23 if x.dtype == torch.float32 else -15)
    return step * (largest.gather(1, group) @ dense.T) + ROUNDINGS * torch.finfo(torch.float32).eps * terms


@pytest.mark.parametrize("isa", HERE, ids=lambda isa: ISAS[isa])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_an_outlier_channel_coarsens_its_own_group_alone(isa: int, dtype: torch.dtype) -> None:
    weight = packed_weight(2, 64, 512, 64)
    layer, x = prepared(weight), random_input(4, 512, dtype)
    x[:, 100] *= 3000
    expected = linear(x.double(), weight, accumulate=torch.float64)
    tolerance = allowed(x, weight) + torch.finfo(dtype).eps * expected.abs()
    assert bool(((codes(layer, x, isa).double() - expected).abs() <= tolerance).all())


@pytest.mark.parametrize("isa", HERE, ids=lambda isa: ISAS[isa])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_input_is_not_hidden(isa: int, bad: float) -> None:
    layer, x = prepared(packed_weight(3, 20, 64, 32)), random_input(2, 64)
    x[1, 40] = bad
    y = codes(layer, x, isa)
    assert bool(y[0].isfinite().all()) and bool(y[1].isnan().all())


@pytest.mark.parametrize("isa", HERE, ids=lambda isa: ISAS[isa])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e20, 1e37])
def test_inputs_of_any_size(isa: int, size: float) -> None:
    weight = packed_weight(4, 20, 64, 32)
    x = random_input(2, 64) * size
    expected = linear(x.double(), weight, accumulate=torch.float64)
    y = codes(prepared(weight), x, isa).double()
    assert float((y - expected).norm()) <= TOLERANCE[torch.float32] * float(expected.norm()) + 1e-29


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "sym"), [(16, False), (32, False), (64, True), (128, False), (-1, False)])
def test_repacked_is_no_larger_than_packed_plus_5_percent(bits: int, group_size: int, sym: bool) -> None:
    weight = packed_weight(bits, 576, 1536, group_size, sym=sym)
    assert repack_weight(weight).nbytes <= 1.05 * weight.nbytes


def test_scales_of_a_wider_dtype_keep_their_values() -> None:
    weight = packed_weight(2, 32, 64, 16)
    assert repack_weight(replace(weight, scales=weight.scales.float())).scales.dtype == torch.float16
    weight = replace(weight, scales=torch.rand(4, 32, generator=torch.Generator().manual_seed(0)))
    x = random_input(1, 64)
    assert (
        error(codes(prepared(weight), x, best_isa()), linear(x.double(), weight, accumulate=torch.float64))
        < TOLERANCE[torch.float32]
    )


def test_a_group_that_no_input_belongs_to() -> None:
    """What a g_idx of an untrusted checkpoint may say: any group, any number of inputs in it."""
    weight = replace(packed_weight(3, 20, 64, 16, sym=False), g_idx=torch.tensor([3] * 37 + [0] * 27))
    x = random_input(3, 64)
    assert (
        error(codes(prepared(weight), x, best_isa()), linear(x.double(), weight, accumulate=torch.float64))
        < TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("factor_bits", [16, 4])
def test_the_largest_rank(factor_bits: int) -> None:
    weight = packed_weight(2, 32, 64, 64)
    factors, x = random_factors(weight, 1024, factor_bits), random_input(2, 64)
    expected = linear(x.double(), weight, factors, accumulate=torch.float64)
    assert error(codes(prepared(weight, factors), x, best_isa()), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("isa", HERE, ids=lambda isa: ISAS[isa])
@pytest.mark.parametrize("factor_bits", [16, 8, 4])
@pytest.mark.parametrize("rank", [1, 3, 16, 23, 40])
def test_components_that_fill_no_vector(isa: int, factor_bits: int, rank: int) -> None:
    # Two groups of A and a part of one; two groups of B; rows that each thread reads for itself, and more.
    weight = packed_weight(4, 100, 150, 32, sym=False, desc_act=True)
    factors = random_factors(weight, rank, factor_bits)
    layer = prepared(weight, factors)
    for dtype, tolerance in TOLERANCE.items():
        for rows in (1, 4, 5):
            x = random_input(rows, 150, dtype)
            x[:, 70:] *= 100  # a group's own step
            expected = linear(x.double(), weight, factors, accumulate=torch.float64)
            assert error(codes(layer, x, isa), expected) < tolerance


@pytest.mark.parametrize("isa", HERE, ids=lambda isa: ISAS[isa])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_input_is_not_hidden_by_the_adapter(isa: int, bad: float) -> None:
    # The weight is nothing, so that what is seen went through A and B.
    weight = packed_weight(4, 20, 128, 64)
    weight = replace(weight, scales=torch.zeros_like(weight.scales))
    x = random_input(2, 128)
    x[1, 100] = bad
    y = codes(prepared(weight, random_factors(weight, 5, 4)), x, isa)
    assert bool(y[0].isfinite().all()) and not bool(y[1].isfinite().any())


@pytest.mark.skipif(not HAS_BF16, reason="the processor does not multiply bfloat16")
@pytest.mark.parametrize("rows", [1, 4, 5, 11, 12, 13, 40])
def test_blocks_of_rows_that_are_not_full(rows: int) -> None:
    weight = packed_weight(2, 72, 128, 32)
    x = random_input(rows, 128, torch.bfloat16)
    assert error(matmul(prepared(weight), x), linear(x.double(), weight, accumulate=torch.float64)) < MATMUL_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_are_taken_at_a_time(dtype: torch.dtype) -> None:
    weight = packed_weight(2, 20, 32, 16)
    factors, x = random_factors(weight, 3), random_input(MATMUL_ROWS + 7, 32, dtype)
    layer = prepared(weight, factors)
    expected = linear(x.double(), weight, factors, accumulate=torch.float64)
    assert error(codes(layer, x, best_isa()), expected) < TOLERANCE[dtype]
    if dtype == torch.bfloat16 and HAS_BF16:
        assert error(matmul(layer, x), expected) < MATMUL_TOLERANCE


def test_codes_are_those_of_the_checkpoint() -> None:
    """Exactly, where float32 holds scale · (code − zero)."""
    for bits in (2, 3, 4, 8):
        weight = packed_weight(bits, 40, 112, 16, sym=False, desc_act=True)
        tiles = [tile.clone() for _, _, tile in prepared(weight).dequantized(best_isa())]
        assert torch.equal(torch.cat(tiles, dim=1).T, dequantize(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 33, CODES_ROWS + 3])
def test_layers_stand_side_by_side(rows: int, dtype: torch.dtype) -> None:
    """Each has the values that it has alone, whatever path so many rows take, and widths that fill no strip."""
    weights = [packed_weight(bits, out, 128, 32, seed=out) for bits, out in ((2, 48), (4, 20), (3, 96))]
    layers = [prepared(weight, random_factors(weight, rank, seed=rank), torch.randn(weight.out_features))
              for weight, rank in zip(weights, (4, 8, 3), strict=True)]  # fmt: skip
    x = random_input(rows, 128, dtype)
    alone = [CpuLinears([layer]) for layer in layers]
    together = CpuLinears(layers)
    paths = [lambda one: one.codes(x, best_isa()), lambda one: one.tiles(x, best_isa())]
    if HAS_BF16 and dtype == torch.bfloat16:
        paths.append(lambda one: one.matmul(x))
    for path in paths:
        ys = path(together).split(together.widths, dim=1)
        for y, one in zip(ys, alone, strict=True):
            assert torch.equal(y, path(one))
