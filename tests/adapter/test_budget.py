"""Budgets as users write them, and bytes as files hold them."""

from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.adapter.budget import budget_bytes
from gptqmodel_eora_ext.formats.sizes import ModuleShape, factor_bytes
from gptqmodel_eora_ext.solve import quantize_factors

SHAPES = [ModuleShape("a", 64, 128), ModuleShape("b", 100, 60)]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1000, 1000),
        ("300MB", 300_000_000),
        ("1.5 kib", 1536),
        ("0.25bpw", int(0.25 * (64 * 128 + 100 * 60) / 8)),
        ("R4", 2 * 4 * (64 + 128 + 100 + 60)),
    ],
)
def test_forms(budget: Any, expected: int) -> None:
    assert budget_bytes(budget, SHAPES) == expected


@pytest.mark.parametrize("budget", [0, -5, True, None, 2.5, "", "300", "r", "r1.5", "bpw", "0bpw", "5 parsec", "r8MB"])
def test_other_forms_are_refused(budget: Any) -> None:
    with pytest.raises(ValueError, match="`budget` must be a positive number of bytes"):
        budget_bytes(budget, SHAPES)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [ModuleShape("odd", 65, 33), ModuleShape("even", 128, 64)])
def test_bytes_are_those_of_packed_factors(bits: int, shape: ModuleShape) -> None:
    delta = torch.randn(shape.out_features, shape.in_features, generator=torch.Generator().manual_seed(0))
    packed = quantize_factors(delta, None, torch.randn(5, shape.in_features), bits)
    assert factor_bytes(5, shape, bits) == sum(factor.nbytes for factor in packed)
