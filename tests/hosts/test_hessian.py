"""The factor of the Hessian's inverse beside the host's own."""

from __future__ import annotations

import pytest
import torch
from gptqmodel import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ

from gptqmodel_eora_ext.hosts.gptqmodel.hessian import invert_by_products


def tasks() -> tuple[GPTQ, GPTQ]:
    """The host's own, and one of ours."""
    made = [GPTQ(torch.nn.Linear(320, 8), QuantizeConfig(bits=4, group_size=64)) for _ in range(2)]
    invert_by_products(made[1])
    return made[0], made[1]


def test_it_is_the_hosts_to_rounding() -> None:
    rows = torch.randn(500, 320, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 1, 320)
    hessian = rows.T @ rows / len(rows)
    host, ours = tasks()
    expected, damping = host.hessian_inverse(hessian.clone())
    given = hessian.clone()
    found, used = ours.hessian_inverse(given)
    assert used == damping and torch.equal(given, hessian)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("low", [-5.0, -1e3])
def test_what_is_not_definite_gets_the_hosts_damping(low: float) -> None:
    """The host searches for a damping, and raises the diagonal where none is enough."""
    hessian = torch.eye(320)
    hessian[3, 4] = hessian[4, 3] = low
    host, ours = tasks()
    expected, damping = host.hessian_inverse(hessian.clone())
    found, used = ours.hessian_inverse(hessian.clone())
    assert used == damping
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
