"""Ŵ + BA in the place of a layer's weight, while later layers are calibrated on what it computes."""

from __future__ import annotations

import torch

from ..adapter.factors import ModuleFactors
from ..adapter.layers import oriented


def put_in_place(linear: torch.nn.Module, factors: ModuleFactors) -> torch.Tensor:
    """Have a layer that holds Ŵ compute Ŵ + BA, in the dtype and on the device that its weight has.

    Args:
        linear: a linear layer (or `Conv1D`), its weight Ŵ.
        factors: A, rank × in, and B, out × rank.

    Returns:
        Ŵ as the layer held it, for whoever packs it. The sum is made in float32, which takes two such copies meanwhile.
    """
    quantized: torch.Tensor = linear.weight.data  # type: ignore[assignment,union-attr]
    update = factors.lora_B.to(torch.float32) @ factors.lora_A.to(torch.float32)
    compensated = quantized.to(torch.float32) + oriented(linear, update).to(quantized.device)
    linear.weight.data = compensated.to(quantized.dtype)  # type: ignore[union-attr]
    return quantized
