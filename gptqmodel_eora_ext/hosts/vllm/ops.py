"""The plugin's layers as a torch operator: `torch.compile`, which vLLM uses by default, sees one node for each."""

from __future__ import annotations

import weakref

import torch

from .served import ServedLinear

# Layers of this process by the names that traces hold. A trace that vLLM keeps on disk is used by a later process, in
# which the names must be the same.
_layers: weakref.WeakValueDictionary[str, ServedLinear] = weakref.WeakValueDictionary()


def register_layer(name: str, layer: ServedLinear) -> str:
    """Have the operator find a layer.

    Args:
        name: of the layer in its model.
        layer: found as long as somebody else holds it.

    Returns:
        The name to call it by: with a number, where another model in this process has a layer of the same name.
    """
    unique, number = name, 1
    while unique in _layers:
        number += 1
        unique = f"{name}#{number}"
    _layers[unique] = layer
    return unique


@torch.library.custom_op("gptqmodel_eora_ext::served_linear", mutates_args=())
def served_linear(x: torch.Tensor, name: str, out_features: int) -> torch.Tensor:
    """y of a registered layer, … × out, of x, … × in."""
    return _layers[name](x)


@served_linear.register_fake
def _(x: torch.Tensor, name: str, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
