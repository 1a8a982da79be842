"""The quick GPTQ against one column at a time, against rounding to nearest, and on its grid."""

import pytest
import torch

from gptqmodel_eora_ext.solve import Grid, column_order, gptq, weighted_energy

OUT, IN = 24, 320


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def moment() -> torch.Tensor:
    rows = torch.randn(500, 40, generator=torch.Generator().manual_seed(1))
    mixed = rows @ torch.randn(40, IN, generator=torch.Generator().manual_seed(2))
    noise = 0.3 * torch.randn(500, IN, generator=torch.Generator().manual_seed(3))
    inputs = (mixed + noise) * torch.logspace(0, 1, IN)
    return inputs.T @ inputs / 500


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [64, 50, -1])
def test_rows_keep_to_a_grid_and_widths_do_not_mix(
    weight: torch.Tensor, moment: torch.Tensor, group_size: int, sym: bool
) -> None:
    columns = column_order(moment, group_size)
    grid = Grid(group_size, sym, 2.4)
    narrow, wide = gptq(weight, columns, [2, 4], grid)
    size = IN if group_size == -1 else group_size
    for rounded, levels in ((narrow, 4), (wide, 16)):
        for group in rounded.split(size, dim=1):
            assert all(len(row.unique()) <= levels for row in group)
    torch.testing.assert_close(narrow, gptq(weight, columns, [2], grid)[0])
    assert weighted_energy(weight - wide, moment) < 0.2 * weighted_energy(weight - narrow, moment)


def test_errors_are_spread_as_one_column_at_a_time_would(weight: torch.Tensor, moment: torch.Tensor) -> None:
    """One scale for a row, found before anything is rounded, so that blocks cannot matter."""
    columns = column_order(moment, -1)
    [found] = gptq(weight, columns, [3], Grid(-1))
    damped = moment.double()[columns.order][:, columns.order]
    damped += 0.05 * damped.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    work = weight.double()[:, columns.order]
    scale = 2 * work.abs().amax(1) / 7
    expected = torch.empty_like(work)
    for column in range(IN):
        left = torch.linalg.inv(damped[column:, column:])
        expected[:, column] = ((work[:, column] / scale).round() + 4).clamp(0, 7).sub(4) * scale
        error = (work[:, column] - expected[:, column]) / left[0, 0]
        work[:, column:] -= error[:, None] * left[0]
    off = (found[:, columns.order] - expected).abs() > 1e-4
    # A value on the edge between two codes may fall either way in float32, and takes those after it along.
    assert off.float().mean() < 0.02


def test_better_than_rounding_to_nearest(weight: torch.Tensor, moment: torch.Tensor) -> None:
    for search in (0.0, 2.4):
        grid = Grid(64, True, search)
        spread, nearest = (
            weighted_energy(weight - gptq(weight, column_order(one, 64), [3], grid)[0], moment)
            for one in (moment, moment.diagonal())
        )
        assert spread < 0.6 * nearest


def test_the_search_takes_less_error_than_the_largest_value(weight: torch.Tensor, moment: torch.Tensor) -> None:
    columns = column_order(moment, 64)
    searched, plain = (
        weighted_energy(weight - gptq(weight, columns, [2], Grid(64, True, search))[0], moment) for search in (2.4, 0.0)
    )
    assert searched < 0.8 * plain


def test_groups_stay_together_and_the_loudest_comes_first() -> None:
    diagonal = torch.tensor([1.0, 2.0, 9.0, 3.0, 8.0, 7.0, 0.0])
    assert column_order(diagonal, 2).order.tolist() == [2, 3, 4, 5, 1, 0, 6]
    assert column_order(diagonal, -1).order.tolist() == [2, 4, 5, 3, 1, 0, 6]


def test_a_channel_that_is_always_zero_costs_nothing(weight: torch.Tensor, moment: torch.Tensor) -> None:
    dead = moment.clone()
    dead[7], dead[:, 7] = 0, 0
    [rounded] = gptq(weight, column_order(dead, 64), [4], Grid(64))
    assert torch.isfinite(rounded).all() and not rounded[:, 7].any()
