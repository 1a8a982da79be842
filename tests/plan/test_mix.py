"""Bits and ranks together: optimal against every combination, within the total."""

import itertools

import pytest

from gptqmodel_eora_ext.formats.sizes import ModuleShape, factor_bytes, weight_bytes
from gptqmodel_eora_ext.plan import PLANNED_BITS, PlannedModule, mixed
from gptqmodel_eora_ext.plan.forecast import Forecast
from gptqmodel_eora_ext.plan.mix import mixed_with_adapter
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


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_bytes_kept_for_factors(
    modules: list[PlannedModule], shapes: list[ModuleShape], grid: Grid, share: float
) -> None:
    """Widths are those of the best plain mix of the other bytes; factors get what widths leave, and all within it."""
    least, most = (plain_bytes(shapes, bits, grid.group_size) for bits in (2, 4))
    total, adapter = round(least + share * (most - least)), 3000
    found = mixed_with_adapter(modules, total, grid, 4, adapter=adapter)
    plain = [PlannedModule(one.shape, {bits: Forecast(known.total, known.gains[:0])
                                       for bits, known in one.forecasts.items()}) for one in modules]  # fmt: skip
    assert found.bits == mixed(plain, max(total - adapter, least), grid, 4).bits
    assert found.total_bytes <= total
    # What is left is less than the next component of the largest module.
    free = mixed(modules, total, grid, 4)
    assert found.loss >= free.loss - 1e-12
    assert found.adapter_bytes >= min(adapter, total - least) - factor_bytes(8, shapes[1], 4)


def test_kept_bytes_that_do_not_fit(modules: list[PlannedModule], shapes: list[ModuleShape], grid: Grid) -> None:
    least = plain_bytes(shapes, 2, grid.group_size)
    found = mixed_with_adapter(modules, least + 1000, grid, 4, adapter=10**6)
    assert set(found.bits) == {2} and 0 < found.adapter_bytes <= 1000
    with pytest.raises(ValueError, match="is below what 2 bits in groups of 32 take"):
        mixed_with_adapter(modules, least - 1, grid, 4, adapter=1000)
