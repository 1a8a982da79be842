"""Plans: what the points are, and that more is never predicted to be worse."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.budget import ModuleShape, budget_bytes
from gptqmodel_eora_ext.plan import Point, plan_points
from gptqmodel_eora_ext.refine.sensitivity import Sensitivity

SHAPES = [ModuleShape("a", 64, 128), ModuleShape("b", 128, 64), ModuleShape("c", 96, 96)]
BUDGETS = ("2bpw", "4bpw", "8bpw")


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def moment(features: int) -> torch.Tensor:
        rows = torch.randn(300, features, generator=generator) * torch.logspace(0, -2, features)
        return rows.T @ rows / 300

    weights = {one.name: torch.randn(one.out_features, one.in_features, generator=generator) for one in SHAPES}
    sensitivity = Sensitivity(
        {one.name: moment(one.out_features) for one in SHAPES},
        {one.name: moment(one.in_features) for one in SHAPES},
        300,
        "fisher",
        "",
    )
    return {"shapes": SHAPES, "weights": weights, "sensitivity": sensitivity, "group_size": 32}


@pytest.fixture(scope="module")
def points(inputs: dict[str, Any]) -> list[Point]:
    return plan_points(**inputs, bits=2, factor_bits=(16, 4), budgets=BUDGETS)


def test_points_keep_to_their_budgets(points: list[Point]) -> None:
    assert len(points) == 2 + 2 * 2 * len(BUDGETS)
    weights = sum(shape.weights for shape in SHAPES)
    plain, more = points[:2]
    assert (plain.bits, more.bits) == (2, 3)
    # Two bits, a float16 scale and a two-bit zero for 32 weights.
    assert plain.bpw == pytest.approx(2 + 18 / 32)
    for point in points[2:]:
        assert 0 < point.adapter_bytes <= budget_bytes(point.budget, SHAPES)
        assert point.total_bytes == plain.total_bytes + point.adapter_bytes
        assert point.bpw == pytest.approx(8 * point.total_bytes / weights)


def test_bytes_buy_loss(points: list[Point]) -> None:
    plain, more = points[:2]
    assert more.loss < plain.loss
    for width in (16, 4):
        by_kind = {
            kind: [point for point in points if (point.factor_bits, point.ranks) == (width, kind)]
            for kind in ("uniform", "auto")
        }
        for swept in by_kind.values():
            losses = [plain.loss, *(point.loss for point in swept)]
            assert all(later < earlier for earlier, later in pairwise(losses))
        assert sum(point.knee for point in by_kind["auto"]) == 1
        assert not any(point.knee for point in by_kind["uniform"])
    packed, wide = ({point.budget: point.loss for point in points if point.factor_bits == bits} for bits in (4, 16))
    assert all(packed[budget] < wide[budget] for budget in BUDGETS)


def test_dominated_is_larger_and_worse(points: list[Point]) -> None:
    for point in points:
        better = [
            other
            for other in points
            if other is not point and other.total_bytes <= point.total_bytes and other.loss <= point.loss
        ]
        assert point.dominated == (bool(better) and point.factor_bits > 0)


def test_without_a_next_width(inputs: dict[str, Any]) -> None:
    points = plan_points(**inputs, bits=4, factor_bits=(4,), budgets=BUDGETS[:1])
    assert [point.bits for point in points] == [4, 4, 4]


def test_a_budget_in_no_known_form(inputs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`budget` must be a positive number of bytes"):
        plan_points(**inputs, bits=2, factor_bits=(4,), budgets=("much",))
