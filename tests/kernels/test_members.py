"""Weights of members, row by row: y = x Ŵᵀ + ((x Aᵀ) ∘ g) Bᵀ, on every path of the CPU, against the oracle."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.formats.factors import Factors, QuantizedFactor
from gptqmodel_eora_ext.formats.packed_weights import LayoutError
from gptqmodel_eora_ext.kernels.cpu.build import ISAS, best_isa, library
from gptqmodel_eora_ext.kernels.cpu.factors import repack_factors, unpack_factors
from gptqmodel_eora_ext.kernels.cpu.linear import MATMUL_ROWS, CpuLinear, CpuLinears
from gptqmodel_eora_ext.kernels.cpu.repack import repack_weight
from gptqmodel_eora_ext.kernels.fused import FusedLinear, JointLinears
from gptqmodel_eora_ext.kernels.reference import linear, parts_of
from tests.kernels.cases import packed_weight, random_factors, random_input

needs_compiler = pytest.mark.skipif(library() is None, reason="no C++ compiler")
HERE = range(best_isa() + 1) if library() else range(0)
HAS_BF16 = library() is not None and ISAS[best_isa()] == "avx512-bf16"
WEIGHT = packed_weight(2, 40, 100, 16)
# Of a shared adapter, one with nothing for this module, and two more; no boundary stands where kernels cut.
MEMBERS = (7, 0, 5, 9)
TOLERANCE, MATMUL_TOLERANCE = 2e-6, 5e-3


def stacked(factor_bits: int, members: tuple[int, ...] = MEMBERS, weight=WEIGHT) -> Factors:
    return replace(random_factors(weight, sum(members), factor_bits), members=members)


def random_weights(rows: int, members: int = len(MEMBERS), *, seed: int = 3) -> torch.Tensor:
    """The shared adapter counts fully, the others for some rows."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, members, generator=generator)
    weights *= torch.rand(rows, members, generator=generator) < 0.5
    weights[:, 0] = 1.0
    return weights


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def poisoned(factors: Factors, member: int) -> Factors:
    """The same, with NaN in all that belongs to a member."""
    part = parts_of(factors.members)[member]

    def poison(factor: torch.Tensor | QuantizedFactor) -> torch.Tensor | QuantizedFactor:
        if isinstance(factor, QuantizedFactor):
            scales = factor.scales.clone()
            scales[part] = float("nan")
            return replace(factor, scales=scales)
        values = factor.clone()
        values[part] = float("nan")
        return values

    return replace(factors, down=poison(factors.down), up=poison(factors.up))


def test_the_oracle_is_the_formula() -> None:
    factors, x, weights = stacked(16), random_input(6, 100).double(), random_weights(6)
    down, up = factors.dense(torch.float64)
    each = weights.double().repeat_interleave(torch.tensor(MEMBERS), dim=1)
    expected = linear(x, WEIGHT, accumulate=torch.float64) + (x @ down.T * each) @ up
    assert error(linear(x, WEIGHT, factors, weights=weights, accumulate=torch.float64), expected) < 1e-12


@needs_compiler
@pytest.mark.parametrize("isa", HERE, ids=lambda isa: ISAS[isa])
@pytest.mark.parametrize("factor_bits", [16, 8, 4])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_codes(isa: int, factor_bits: int, rows: int) -> None:
    factors, x, weights = stacked(factor_bits), random_input(rows, 100), random_weights(rows)
    layer = CpuLinears([CpuLinear(repack_weight(WEIGHT), repack_factors(factors))])
    expected = linear(x.double(), WEIGHT, factors, weights=weights, accumulate=torch.float64)
    assert error(layer.codes(x, isa, weights), expected) < TOLERANCE
    assert error(layer.tiles(x, isa, weights), expected) < TOLERANCE


@needs_compiler
@pytest.mark.parametrize("factor_bits", [16, 8, 4])
def test_a_member_without_weight_in_any_row_is_not_read(factor_bits: int) -> None:
    """Its factors are NaN, and 0 · NaN would be NaN."""
    factors, x, weights = poisoned(stacked(factor_bits), 2), random_input(5, 100), random_weights(5)
    weights[:, 2] = 0.0
    layer = CpuLinears([CpuLinear(repack_weight(WEIGHT), repack_factors(factors))])
    paths = [layer.codes(x, best_isa(), weights), layer.codes(x[:1], best_isa(), weights[:1]),
             layer.tiles(x, best_isa(), weights)]  # fmt: skip
    if HAS_BF16:
        paths.append(layer.matmul(x.to(torch.bfloat16), weights))
    assert all(bool(torch.isfinite(y).all()) for y in paths)
    weights[3, 2] = 0.5
    assert not bool(torch.isfinite(layer.codes(x, best_isa(), weights)).all())


@pytest.mark.skipif(not HAS_BF16, reason="no processor that multiplies bfloat16")
@pytest.mark.parametrize("factor_bits", [16, 4])
def test_matmul(factor_bits: int) -> None:
    """More rows than are taken at a time; a member's rows may all lie in one part."""
    rows = MATMUL_ROWS + 30
    factors, x, weights = stacked(factor_bits), random_input(rows, 100, torch.bfloat16), random_weights(rows)
    weights[:MATMUL_ROWS, 3] = 0.0
    weights[MATMUL_ROWS:, 3] = 1.0
    layer = CpuLinears([CpuLinear(repack_weight(WEIGHT), repack_factors(factors))])
    expected = linear(x.double(), WEIGHT, factors, weights=weights, accumulate=torch.float64)
    assert error(layer.matmul(x, weights), expected) < MATMUL_TOLERANCE


@needs_compiler
@pytest.mark.parametrize("factor_bits", [16, 4])
def test_layers_that_share_an_input(factor_bits: int) -> None:
    """With other ranks of the members in each; one has no adapter."""
    weights, x = random_weights(3), random_input(3, 100)
    pairs = [stacked(factor_bits), stacked(factor_bits, (0, 6, 2, 0)), None]
    layers = [FusedLinear(repack_weight(WEIGHT), pair) for pair in pairs]
    ys = JointLinears(layers)(x, weights)
    for y, pair, layer in zip(ys, pairs, layers, strict=True):
        expected = linear(x.double(), WEIGHT, pair, weights=weights, accumulate=torch.float64)
        assert error(y, expected) < TOLERANCE
        assert error(layer(x, weights), expected) < TOLERANCE
    if not HAS_BF16:
        return
    weights, x = random_weights(40), random_input(40, 100, torch.bfloat16)
    joint = CpuLinears([layer.cpu for layer in layers])
    for y, pair in zip(joint.matmul(x, weights).split(joint.widths, dim=1), pairs, strict=True):
        expected = linear(x.double(), WEIGHT, pair, weights=weights, accumulate=torch.float64)
        assert error(y, expected) < MATMUL_TOLERANCE


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), st.integers(1, 6), st.integers(0, 999))
def test_any_members(members: list[int], rows: int, seed: int) -> None:
    """A row in a batch gives what the row alone gives; and equals the adapter that its members add up to."""
    factors = stacked(16, tuple(members))
    weights, x = random_weights(rows, len(members), seed=seed), random_input(rows, 100, seed=seed)
    layer = FusedLinear(repack_weight(WEIGHT), factors)
    together = layer(x, weights)
    alone = torch.cat([layer(x[row : row + 1], weights[row : row + 1].contiguous()) for row in range(rows)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    down, up = factors.dense(torch.float32)
    each = weights.repeat_interleave(torch.tensor(members), dim=1)
    for row in range(rows):
        merged = Factors(down * each[row, :, None], up)
        expected = linear(x[row : row + 1].double(), WEIGHT, merged, accumulate=torch.float64)
        assert error(alone[row : row + 1], expected) < 5e-6


@needs_compiler
def test_the_gradient_by_x() -> None:
    factors, weights = stacked(8), random_weights(4)
    x = random_input(4, 100).requires_grad_()
    y = FusedLinear(repack_weight(WEIGHT), factors)(x, weights)
    grad = random_input(4, 40, seed=9)
    (found,) = torch.autograd.grad(y, x, grad)
    wide = x.detach().double().requires_grad_()
    linear(wide, WEIGHT, factors, weights=weights, accumulate=torch.float64).backward(grad.double())
    assert wide.grad is not None
    assert error(found, wide.grad) < 1e-5


@needs_compiler
def test_members_survive_repacking() -> None:
    assert unpack_factors(repack_factors(stacked(4))).members == MEMBERS


@needs_compiler
def test_weights_of_another_shape_are_refused() -> None:
    layer = FusedLinear(repack_weight(WEIGHT), stacked(16), name="layers.0.q_proj")
    for weights in (torch.ones(2, 3), torch.ones(1, 4)):
        with pytest.raises(LayoutError, match=r"layers\.0\.q_proj.*weights of members"):
            layer(random_input(2, 100), weights)


@pytest.mark.parametrize("members", [(7, 5), (22, -1), (30,)])
def test_members_that_do_not_add_up(members: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match="add up to 21"):
        replace(random_factors(WEIGHT, 21), members=members)


def test_parts() -> None:
    assert [range(21)[part] for part in parts_of(MEMBERS)] == [
        range(first, last) for first, last in itertools.pairwise((0, 7, 7, 12, 21))
    ]
