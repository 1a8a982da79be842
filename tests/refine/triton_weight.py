"""A trained layer over a weight that Triton dequantises: run by `test_triton.py` in a process of its own.

TRITON_INTERPRET=1 python -m pytest tests/refine/triton_weight.py
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from gptqmodel_eora_ext.formats.packed_weights import PackedWeight
from gptqmodel_eora_ext.kernels.reference import dequantize
from gptqmodel_eora_ext.kernels.triton.ops import StackedLinears
from gptqmodel_eora_ext.refine.linear import TrainedLinear

from ..kernels.on_device import DEVICE, packed_weight


@dataclass
class TritonWeight:
    """As the host's module offers it."""

    weight: PackedWeight

    def __post_init__(self) -> None:
        self.in_features, self.out_features, self.bias = self.weight.in_features, self.weight.out_features, None
        self._stacked = StackedLinears.prepare([self.weight], [None], [None])

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return next(self._stacked.dense(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_outputs_and_gradients_are_the_oracle_s(bits: int, group_size: int) -> None:
    weight = packed_weight(bits=bits, group_size=group_size, in_features=72, out_features=130)
    generator = torch.Generator().manual_seed(0)

    def leaf(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=generator).to(DEVICE).requires_grad_()

    down, up, x = leaf(3, 72), leaf(3, 130), leaf(70, 72)
    y = TrainedLinear(TritonWeight(weight), (down, up))(x)
    expected = x @ (dequantize(weight) + up.T @ down).T
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-3 * float(expected.detach().abs().max()))
    wanted = torch.autograd.grad(expected.square().sum(), (x, down, up))
    for mine, theirs in zip(torch.autograd.grad(y.square().sum(), (x, down, up)), wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
