"""Forecasts against GPTQModel's own GPTQ, on a real module with the same second moment."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gptqmodel import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ

from gptqmodel_eora_ext.hosts.gptqmodel.grids import module_grid, spreads_errors
from gptqmodel_eora_ext.solve import column_order, gptq, weighted_energy

OUT, IN, TOKENS = 96, 384, 600


def by_the_host(linear: torch.nn.Linear, inputs: torch.Tensor, config: Any) -> torch.Tensor:
    task = GPTQ(copy.deepcopy(linear), qcfg=copy.deepcopy(config))
    task.quantizer.configure(perchannel=True)
    task.expected_nsamples = len(inputs)
    task.add_batch(inputs[None], inputs[None] @ linear.weight.T)
    return task.quantize()[0].float()


@pytest.mark.parametrize("mse", [0.0, 2.4])
@pytest.mark.parametrize("bits", [2, 3])
def test_errors_are_the_hosts(bits: int, mse: float) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = torch.randn(OUT, IN, generator=generator)
    inputs = torch.randn(TOKENS, 64, generator=generator) @ torch.randn(64, IN, generator=generator)
    inputs = (inputs + torch.randn(TOKENS, IN, generator=generator)) * torch.logspace(0, 1, IN)
    moment = inputs.T @ inputs / TOKENS
    config = QuantizeConfig(bits=bits, group_size=64, mse=mse)
    grid = module_grid(config, "any")
    assert (grid.group_size, grid.sym, grid.scale_search) == (64, True, mse) and spreads_errors(config)
    [ours] = gptq(linear.weight.data, column_order(moment, 64), [bits], grid)
    energies = [
        weighted_energy(linear.weight.data - one, moment) for one in (ours, by_the_host(linear, inputs, config))
    ]
    # The search tries 15 ends of the grid, the host 80.
    assert energies[0] == pytest.approx(energies[1], rel=0.05 if mse else 0.01)
