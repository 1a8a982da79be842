"""Weights as layers hold them, and Ŵ + BA in their place while later layers are calibrated."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers

from ..adapter.factors import ModuleFactors
from ..formats.sizes import ModuleShape


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is one that can be compensated: y = x Wᵀ, or GPT-2's `Conv1D`, y = x W."""
    return isinstance(module, (torch.nn.Linear, transformers.Conv1D))


def shape_of(name: str, module: torch.nn.Module) -> ModuleShape:
    """The shape of a linear layer, out × in however the layer holds its weight."""
    out_features, in_features = oriented(module, module.weight).shape  # type: ignore[arg-type]
    return ModuleShape(name, out_features, in_features)


def use_linear_layers(model: torch.nn.Module) -> Callable[[], None]:
    """Have every `Conv1D` of a model be the `Linear` that computes the same, over the same weights.

    So what measures and forecasts a model has one kind of layer to know.

    Returns:
        What puts them back.
    """
    replaced = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, transformers.Conv1D)
    ]
    for parent, name, child in replaced:
        setattr(parent, name, _as_linear(child))

    def put_back() -> None:
        for parent, name, child in replaced:
            setattr(parent, name, child)

    return put_back


def _as_linear(conv1d: torch.nn.Module) -> torch.nn.Linear:
    weight: torch.Tensor = conv1d.weight  # type: ignore[assignment]
    in_features, out_features = weight.shape
    linear = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)
    linear.bias = conv1d.bias  # type: ignore[assignment]
    return linear


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
