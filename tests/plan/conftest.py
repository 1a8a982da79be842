"""A small model's forecasts."""

from __future__ import annotations

import pytest
import torch

from gptqmodel_eora_ext.formats.sizes import ModuleShape
from gptqmodel_eora_ext.plan import PlannedModule, plan_question, planned_modules, sweep_rank
from gptqmodel_eora_ext.plan.forecast import Forecast, ModuleMoments, forecast
from gptqmodel_eora_ext.plan.sweep import Swept
from gptqmodel_eora_ext.solve import Grid, column_order, gptq

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

    found: dict[str, dict[int, Forecast]] = {}
    question = plan_question(shapes, grid, most=sweep_rank(shapes, BUDGETS, (16, 4)))
    weights = {one.name: torch.randn(one.out_features, one.in_features, generator=generator) for one in shapes}
    outputs = {one.name: moment(one.out_features, 1e-3) for one in shapes}
    for one in shapes:
        inputs, how = moment(one.in_features), question.rounding(one.name)
        rounded = gptq(weights[one.name], column_order(inputs, grid.group_size), how.bits, grid)
        found[one.name] = {
            bits: forecast(weights[one.name] - approximation, ModuleMoments(inputs, outputs[one.name]),
                           question.rank(one.name, bits))
            for bits, approximation in zip(how.bits, rounded, strict=True)
        }  # fmt: skip
    return planned_modules(shapes, Swept(found, {}, outputs))
