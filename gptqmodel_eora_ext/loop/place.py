"""Weights as layers hold them, and Ŵ + BA in their place while later layers are calibrated."""

from __future__ import annotations

import torch
import transformers

from ..adapter.factors import ModuleFactors


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is one that can be compensated: y = x Wᵀ, or GPT-2's `Conv1D`, y = x W."""
    return isinstance(module, (torch.nn.Linear, transformers.Conv1D))


def oriented(module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A linear layer's weight as out × in, from how the layer holds it; and back."""
    return weight.T if isinstance(module, transformers.Conv1D) else weight


def put_in_place(linear: torch.nn.Module, factors: ModuleFactors) -> torch.Tensor:
    """Have a layer that holds Ŵ compute Ŵ + BA, in the dtype that it has.

    Returns:
        Ŵ as the layer held it, for whoever packs it.
    """
    quantized: torch.Tensor = linear.weight.data  # type: ignore[assignment,union-attr]
    update = factors.lora_B.to(torch.float32) @ factors.lora_A.to(torch.float32)
    compensated = quantized.to(torch.float32) + oriented(linear, update).to(quantized.device)
    linear.weight.data = compensated.to(quantized.dtype)  # type: ignore[union-attr]
    return quantized
