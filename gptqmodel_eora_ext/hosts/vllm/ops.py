"""The plugin's layers as torch operators: `torch.compile`, which vLLM uses by default, sees one node for each."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from .served import ServedLinear

# Layers of this process by the names that traces hold. A trace that vLLM keeps on disk is used by a later process, in
# which the names must be the same.
_layers: weakref.WeakValueDictionary[str, ServedLinear] = weakref.WeakValueDictionary()
# Operators last as long as this object. `torch.library.custom_op` would do the same with less code here, but to call it
# took 63 µs where this took 29, on a busy machine; SmolLM2 makes 120 such calls for a token.
_library = torch.library.Library("gptqmodel_eora_ext", "FRAGMENT")


def _fake(x: torch.Tensor, name: str, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def define(operator: str, implementation: Callable[[torch.Tensor, str, int], torch.Tensor]) -> Any:
    """An operator that gives y of a layer by its name, … × out, of x, … × in.

    Args:
        operator: its name.
        implementation: takes x, the layer's name, and out.
    """
    _library.define(f"{operator}(Tensor x, str name, SymInt out_features) -> Tensor")
    for key in ("CPU", "CUDA"):
        _library.impl(operator, implementation, key)
    _library._register_fake(operator, _fake)
    return getattr(torch.ops.gptqmodel_eora_ext, operator).default


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


def _served_linear(x: torch.Tensor, name: str, out_features: int) -> torch.Tensor:
    return _layers[name](x)


served_linear = define("served_linear", _served_linear)
