"""Points: what they are, and that more is never predicted to be worse."""

from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gptqmodel_eora_ext.adapter.budget import budget_bytes
from gptqmodel_eora_ext.formats.sizes import ModuleShape
from gptqmodel_eora_ext.plan import PlannedModule, Point, plan_points, planned
from gptqmodel_eora_ext.plan.picture import draw
from gptqmodel_eora_ext.plan.points import MARGIN, PLAIN, UNIFORM
from gptqmodel_eora_ext.solve import Grid

from .conftest import BUDGETS

PLAIN_BITS = (2, 3, 4)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def points(modules: list[PlannedModule], grid: Grid) -> list[Point]:
    return plan_points(modules, grid, bits=2, factor_bits=(16, 4), budgets=BUDGETS)


def test_points_keep_to_their_budgets(points: list[Point], shapes: list[ModuleShape]) -> None:
    assert len(points) == len(PLAIN_BITS) + (2 * 2 + 1) * len(BUDGETS)
    weights = sum(shape.weights for shape in shapes)
    plains = points[: len(PLAIN_BITS)]
    assert tuple(point.bits for point in plains) == PLAIN_BITS
    # Two bits, a float16 scale and a two-bit zero for 32 weights.
    assert plains[0].bpw == pytest.approx(2 + 18 / 32)
    for point in points[len(PLAIN_BITS) :]:
        allowed = budget_bytes(point.budget, shapes)
        assert point.bpw == pytest.approx(8 * point.total_bytes / weights)
        if point.ranks == "mixed":
            assert point.total_bytes <= plains[0].total_bytes + allowed
        else:
            assert 0 < point.adapter_bytes <= allowed
            assert point.total_bytes == plains[0].total_bytes + point.adapter_bytes


def test_bytes_buy_loss(points: list[Point]) -> None:
    plains = points[: len(PLAIN_BITS)]
    assert plains[0].loss > plains[1].loss > plains[2].loss
    for width in (16, 4):
        by_kind = {
            kind: [point for point in points if (point.factor_bits, point.ranks) == (width, kind)]
            for kind in ("uniform", "auto")
        }
        for swept in by_kind.values():
            losses = [plains[0].loss, *(point.loss for point in swept)]
            assert all(later < earlier for earlier, later in pairwise(losses))
        assert sum(point.knee for point in by_kind["auto"]) == 1
        assert not any(point.knee for point in by_kind["uniform"])
    packed, wide = ({point.budget: point.loss for point in points if point.factor_bits == bits} for bits in (4, 16))
    assert all(packed[budget] < wide[budget] for budget in BUDGETS)


def test_dominated_is_larger_and_worse(points: list[Point]) -> None:
    alone = [point for point in points if point.ranks != "mixed"]
    for point in alone:
        better = [
            other.title
            for other in alone
            if other is not point
            and other.total_bytes <= point.total_bytes
            and (MARGIN if point.ranks == "none" else 1.0) * other.loss <= point.loss
        ]
        assert point.dominated == bool(better) and (not better or point.dominated_by in better)
    # 8 bits of adapter for a weight are no match for plain 4 bits.
    largest = next(point for point in alone if point.budget == "8bpw" and point.factor_bits == 16)
    assert largest.dominated_by.startswith("plain")


def test_mixes_have_every_other_choice_among_theirs(points: list[Point]) -> None:
    for mix in (point for point in points if point.ranks == "mixed"):
        # A uniform rank that is no multiple of 8, and chosen components, are not among them.
        rivals = [point for point in points if point.ranks == "none" and point.total_bytes <= mix.total_bytes]
        assert all(mix.loss <= rival.loss for rival in rivals)
        assert not mix.dominated


def test_bits_and_ranks_lower_a_modules_loss(modules: list[PlannedModule]) -> None:
    for module in modules:
        assert 0 < module.loss(4) < module.loss(2) == module.forecasts[2].total
        assert module.loss(2, 16) < module.loss(2, 16, 4) < module.loss(2)


def test_a_budget_in_no_known_form(modules: list[PlannedModule], grid: Grid) -> None:
    with pytest.raises(ValueError, match="`budget` must be a positive number of bytes"):
        plan_points(modules, grid, bits=2, factor_bits=(4,), budgets=("much",))


def test_a_picture_shows_every_line(
    points: list[Point], modules: list[PlannedModule], grid: Grid, tmp_path: Path
) -> None:
    chosen = planned(modules, points[1].total_bytes, grid, 4, model="m", sensitivity="fisher")
    draw(points, chosen, tmp_path / "plan.svg", title="m")
    root = ElementTree.parse(tmp_path / "plan.svg").getroot()
    words = {" ".join("".join(one.itertext()).split()) for one in root.iter(f"{SVG}text")}
    expected = {"no adapter", "bits and ranks chosen together", "this plan", "m"}
    for width in {point.factor_bits for point in points if point.ranks == UNIFORM}:
        expected |= {f"one rank for all, {width}-bit factors", f"chosen ranks, {width}-bit factors"}
    expected |= {f"{point.bits} bits" for point in points if point.ranks == PLAIN}
    assert expected <= words
    # A marker for every point (the frame's ticks are markers as well).
    assert len(list(root.iter(f"{SVG}use"))) > len(points)
