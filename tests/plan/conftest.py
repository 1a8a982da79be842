"""A small model's forecasts."""

from __future__ import annotations

import pytest
import torch

from gptqmodel_eora_ext.formats.sizes import ModuleShape
from gptqmodel_eora_ext.plan import PlannedModule, forecast_modules, sweep_rank
from gptqmodel_eora_ext.plan.sensitivity import Sensitivity
from gptqmodel_eora_ext.solve import Grid

BUDGETS = ("2bpw", "4bpw", "8bpw")


@pytest.fixture(scope="session")
def shapes() -> list[ModuleShape]:
    return [ModuleShape("a", 64, 128), ModuleShape("b", 128, 64), ModuleShape("c", 96, 96)]


@pytest.fixture(scope="session")
def grid() -> Grid:
    return Grid(group_size=32, scale_search=2.4)


@pytest.fixture(scope="session")
def modules(shapes: list[ModuleShape], grid: Grid) -> list[PlannedModule]:
    generator = torch.Generator().manual_seed(0)

    def moment(features: int, scale: float = 1.0) -> torch.Tensor:
        rows = torch.randn(300, features, generator=generator) * torch.logspace(0, -2, features)
        return scale * rows.T @ rows / 300

    weights = {one.name: torch.randn(one.out_features, one.in_features, generator=generator) for one in shapes}
    sensitivity = Sensitivity(
        {one.name: moment(one.out_features, 1e-3) for one in shapes},
        {one.name: moment(one.in_features) for one in shapes},
        {},
        300,
        "fisher",
        "",
    )
    most = sweep_rank(shapes, BUDGETS, (16, 4))
    return forecast_modules(shapes, weights, sensitivity, grid, most=most)
