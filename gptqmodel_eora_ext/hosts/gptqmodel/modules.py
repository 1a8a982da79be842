"""The modules that GPTQModel's loop will quantise, and the full-precision model that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...formats.sizes import ModuleShape
from ...loop.place import is_linear, shape_of, use_linear_layers
from ...system.memory import roomy_device


def full_precision(model: Any, shapes: Sequence[ModuleShape]) -> tuple[torch.nn.Module, dict[str, torch.nn.Linear]]:
    """The whole model in memory, and its linear layers; GPTQModel keeps its own on disk and brings in layer by layer.

    GPT-2's `Conv1D` is a `Linear` in it.

    Raises:
        NotImplementedError: for a module that is no linear layer in transformers' own model.
    """
    from transformers import AutoModelForCausalLM

    dense: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        model.model_local_path, dtype="auto", trust_remote_code=bool(model.trust_remote_code)
    )
    device = roomy_device(dense, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    # For good: nobody else has this model.
    use_linear_layers(dense)
    known = dict(dense.to(device).named_modules())
    strange = [shape.name for shape in shapes if not isinstance(known.get(shape.name), torch.nn.Linear)]
    if strange:
        raise NotImplementedError(
            f"EoRA: {strange[0]} is no linear layer of its own in transformers' model (experts may share a tensor), so "
            f"its sensitivity cannot be measured. Name a rank in place of the budget."
        )
    linears: dict[str, Any] = {shape.name: known[shape.name] for shape in shapes}
    return dense, linears


def module_shapes(model: Any) -> list[ModuleShape]:
    """Linear modules in the order in which the loop quantises them.

    Raises:
        ValueError: for a model without any.
    """
    shapes = linear_shapes(model)
    if not shapes:
        raise ValueError("EoRA: the model has no linear module to compensate.")
    return shapes


def linear_shapes(model: Any) -> list[ModuleShape]:
    """The same; empty for a model without any."""
    config = model.quantize_config
    known = dict(model.model.named_modules())
    names = [name for subset in model.simple_layer_modules(model.model.config, config) for name in subset]
    shapes = []
    for layers in model.extract_layers_node():
        for index in range(len(known[layers])):
            for name in names:
                full = f"{layers}.{index}.{name}"
                linear = known.get(full)
                if linear is not None and is_linear(linear) and config.dynamic_get(full) is not False:
                    shapes.append(shape_of(full, linear))
    return shapes
