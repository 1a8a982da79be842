"""The modules that GPTQModel's loop will quantise, and the full-precision model that they belong to."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gptqmodel.utils.model import get_layers_with_prefixes

from ...adapter.layers import is_linear, shape_of
from ...formats.sizes import ModuleShape
from ...plan.checkpoint import CheckpointWeights
from ...plan.layered import LayeredModel

# What stands in the path of an expert, and the dimensions of a tensor of all: experts × out × in.
EXPERTS = ".experts."
EXPERTS_DIMENSIONS = 3


def layered(model: Any, shapes: Sequence[ModuleShape]) -> LayeredModel:
    """The full-precision model, to be run layer by layer.

    GPTQModel may load a model as a shell, whose weights stay in the checkpoint's files and whose experts are linear
    layers of their own. Then a copy of the shell is used, otherwise the model in memory. GPTQModel's object is not
    changed.

    Args:
        model: GPTQModel's model object, before its loop.
        shapes: the modules that it quantises.

    Raises:
        NotImplementedError: for modules that are not in one list of layers.
    """
    names = [shape.name for shape in shapes]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if model.turtle_model is None:
        return LayeredModel(model.model, None, names, device)
    shell = copy.deepcopy(model.model).eval()
    shell.tie_weights()
    return LayeredModel(shell, ShellWeights(model.turtle_model), names, device)


class ShellWeights:
    """Reads the weights of GPTQModel's shell, by GPTQModel's reader: it knows how checkpoints name and lay out tensors.

    Args:
        source: GPTQModel's `LazyTurtle`.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._checkpoint = CheckpointWeights(Path(source.model_local_path))

    def fill(self, model: torch.nn.Module, name: str) -> None:
        """See `Weights`."""
        self._source.materialize_submodule(
            target_model=model,
            target_submodule=model.get_submodule(name),
            device=torch.device("cpu"),
            module_path=name,
            tie_weights=False,
            show_progress=False,
        )
        # GPTQModel's reader leaves out a head that is tied to the embeddings.
        self._checkpoint.fill(model, name)

    def samples(self, rows: int) -> Iterator[tuple[str, Sequence[int], torch.Tensor]]:
        """See `Weights`."""
        return self._checkpoint.samples(rows)


def module_shapes(model: Any) -> list[ModuleShape]:
    """Linear modules in the order in which the loop quantises them.

    Raises:
        ValueError: for a model without any.
    """
    shapes = linear_shapes(model)
    if not shapes:
        raise ValueError("EoRA: the model has no linear module to compensate.")
    return shapes


def check_experts(model: Any) -> None:
    """Refuse a mixture of experts of which GPTQModel would quantise none, since the adapter would be of the rest alone.

    Its loader may leave experts in one tensor, or its definition of the model look for them under other names. What
    `dynamic` leaves out is the user's choice.

    Raises:
        NotImplementedError: naming the model type and an expert, or for a model without layers where GPTQModel looks
            for them.
    """
    subsets = model.simple_layer_modules(model.model.config, model.quantize_config)
    listed = tuple(f".{name}.weight" for subset in subsets for name in subset if EXPERTS in name)
    layers = tuple(f"{name}." for name in layer_names(model))
    experts = [
        name
        for name, parameter in model.model.named_parameters()
        if EXPERTS in name and name.startswith(layers) and parameter.ndim in (2, EXPERTS_DIMENSIONS)
    ]
    if experts and not any(name.endswith(listed) for name in experts):
        raise NotImplementedError(
            f"EoRA: of models of type {model.model.config.model_type} GPTQModel {version('gptqmodel')} quantises no "
            f"expert ({experts[0]} for instance stays as it is), so that an adapter would be of the other modules "
            f"alone. Quantise without an adapter, or with a release of GPTQModel that knows their experts."
        )


def linear_shapes(model: Any) -> list[ModuleShape]:
    """As `module_shapes`, but empty for a model without any linear module.

    Raises:
        NotImplementedError: for a model without layers where GPTQModel looks for them.
    """
    config = model.quantize_config
    known = dict(model.model.named_modules())
    names = [name for subset in model.simple_layer_modules(model.model.config, config) for name in subset]
    shapes = []
    for layer in layer_names(model):
        for name in names:
            full = f"{layer}.{name}"
            linear = known.get(full)
            if linear is not None and is_linear(linear) and config.dynamic_get(full) is not False:
                shapes.append(shape_of(full, linear))
    return shapes


def layer_names(model: Any) -> list[str]:
    """Full names of the layers. GPTQModel may know several places for them, of which a model has some.

    Raises:
        NotImplementedError: for a model that has none of them.
    """
    places = model.extract_layers_node()
    names: list[str] = get_layers_with_prefixes(model.model, places)[1]
    if not names:
        raise NotImplementedError(
            f"EoRA: GPTQModel {version('gptqmodel')} looks for the layers of a model of type "
            f"{model.model.config.model_type} at {' or '.join(places)}, where this transformers has none; it would "
            f"stop. Quantise with releases of both that fit each other."
        )
    return names
