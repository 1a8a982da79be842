"""Bits and ranks together: optimal against every combination, within the total."""

import itertools

import pytest

from gptqmodel_eora_ext.formats.sizes import ModuleShape, factor_bytes, weight_bytes
from gptqmodel_eora_ext.plan import PLANNED_BITS, PlannedModule, mixed
from gptqmodel_eora_ext.plan.modules import plain_bytes
from gptqmodel_eora_ext.solve import Grid

RANKS = (0, 8, 16)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_least_loss_of_all_combinations(
    modules: list[PlannedModule], shapes: list[ModuleShape], grid: Grid, share: float
) -> None:
    least, most = (plain_bytes(shapes, bits, grid.group_size) for bits in (2, 4))
    total = round(least + share * (most - least))
    found = mixed(modules, total, grid, 4)
    sizes = [
        weight_bytes(shape, bits, grid.group_size) + factor_bytes(rank, shape, 4)
        for shape, bits, rank in zip(shapes, found.bits, found.ranks, strict=True)
    ]
    assert found.total_bytes == sum(sizes) <= total
    assert found.adapter_bytes == found.total_bytes - sum(
        weight_bytes(shape, bits, grid.group_size) for shape, bits in zip(shapes, found.bits, strict=True)
    )
    best = min(
        sum(module.loss(*choice, 4) for module, choice in zip(modules, choices, strict=True))
        for choices in itertools.product(itertools.product(PLANNED_BITS, RANKS), repeat=len(modules))
        if sum(
            weight_bytes(shape, bits, grid.group_size) + factor_bytes(rank, shape, 4)
            for shape, (bits, rank) in zip(shapes, choices, strict=True)
        )
        <= total
    )
    # Larger ranks than these may be better still.
    assert found.loss <= best + 1e-12
    assert found.loss == pytest.approx(
        sum(module.loss(bits, rank, 4) for module, bits, rank in zip(modules, found.bits, found.ranks, strict=True))
    )


def test_enough_room_takes_the_most_bits(modules: list[PlannedModule], shapes: list[ModuleShape], grid: Grid) -> None:
    found = mixed(modules, 4 * plain_bytes(shapes, 4, grid.group_size), grid, 4)
    assert set(found.bits) == {4}


def test_a_total_below_the_fewest_bits(modules: list[PlannedModule], grid: Grid) -> None:
    with pytest.raises(ValueError, match=r"1000 bytes .* is below what 2 bits in groups of 32 take"):
        mixed(modules, 1000, grid, 4)
