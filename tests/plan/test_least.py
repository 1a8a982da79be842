"""The least budget that buys anything, and sweeps that ask for no less."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptqmodel_eora_ext.adapter.options import AdapterOptions
from gptqmodel_eora_ext.adapter.vocabulary import FACTOR_BITS
from gptqmodel_eora_ext.formats.sizes import ModuleShape, factor_bytes
from gptqmodel_eora_ext.loop.budgeting import check_budget
from gptqmodel_eora_ext.plan import SWEEP, affordable, least_budget, plan_points, sweep_rank
from gptqmodel_eora_ext.plan.file import without_groups
from gptqmodel_eora_ext.plan.ranks import RANK_STEP, rank_options
from gptqmodel_eora_ext.solve import Grid

SHAPES = [ModuleShape("a", 64, 128), ModuleShape("b", 32, 64)]


def test_zeros_of_others_count_in_16_bits() -> None:
    assert least_budget(SHAPES, 16) == factor_bytes(1, SHAPES[0], 16) + factor_bytes(RANK_STEP, SHAPES[1], 16)
    assert least_budget(SHAPES, 4) == factor_bytes(RANK_STEP, SHAPES[1], 4)
    assert least_budget(SHAPES, 4, {"a": 2, "b": 0}.get) == factor_bytes(2, SHAPES[0], 4)


sides = st.integers(RANK_STEP, 300)
shapes = st.lists(
    st.builds(lambda rows, columns: ModuleShape("m", rows, columns), sides, sides), min_size=1, max_size=4
)


@given(shapes=shapes, width=st.sampled_from(FACTOR_BITS), most=st.integers(RANK_STEP, 64))
def test_no_choice_but_zeros_is_below_the_least(shapes: list[ModuleShape], width: int, most: int) -> None:
    options = [rank_options(shape, most, width) for shape in shapes]
    zeros = sum(one.nbytes[0] for one in options)
    with_one = min(zeros - one.nbytes[0] + one.nbytes[1] for one in options)
    assert least_budget(shapes, width) == with_one > zeros


@pytest.mark.parametrize("width", FACTOR_BITS)
def test_a_budget_that_buys_nothing_is_refused_with_the_least_that_does(width: int) -> None:
    least = least_budget(SHAPES, width)
    asked = AdapterOptions.settle(budget=least - 1, factor_bits=width)
    with pytest.raises(ValueError, match=f"is {least - 1} bytes, which buys nothing.* takes {least} bytes"):
        check_budget(least - 1, SHAPES, asked, lambda name: None)
    check_budget(least, SHAPES, asked, lambda name: None)


def test_a_sweep_asks_for_what_can_be(modules: Any) -> None:
    narrow = [ModuleShape("a", 64, 64)]
    assert affordable(narrow, SWEEP, (16,)) == () and sweep_rank(narrow, (), (16,)) == 0
    assert set(affordable(narrow, SWEEP, (16, 4))) < set(SWEEP)
    points = plan_points(modules, Grid(32), bits=2, factor_bits=(16, 4), budgets=("1b", "64kB"), with_mixes=False)
    assert {point.budget for point in points} == {"", "64kB"}
    assert {point.budget for point in plan_points(modules, Grid(32), bits=2, factor_bits=(16,), budgets=())} == {""}


def test_whole_rows_have_no_groups_to_order_columns_by() -> None:
    assert without_groups(-1) == {"act_group_aware": False} and without_groups(64) == {}
