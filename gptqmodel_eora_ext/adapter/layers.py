"""Linear layers as models hold them: y = x Wᵀ, or GPT-2's `Conv1D`, y = x W."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
import transformers

from ..formats.sizes import ModuleShape

# The list of layers in a module's name, and the layer's number: the first number that stands alone.
NUMBERED = re.compile(r"(?P<list>.+?)\.(?P<number>\d+)\.")


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is one that can be compensated: y = x Wᵀ, or GPT-2's `Conv1D`, y = x W."""
    return isinstance(module, (torch.nn.Linear, transformers.Conv1D))


def shape_of(name: str, module: torch.nn.Module) -> ModuleShape:
    """The shape of a linear layer, out × in; its weight may be on disk, so it is not asked."""
    if isinstance(module, transformers.Conv1D):
        return ModuleShape(name, int(module.nf), int(module.nx))
    return ModuleShape(name, int(module.out_features), int(module.in_features))  # type: ignore[arg-type]


def layer_number(name: str) -> int | None:
    """The number of the layer that a module is in, by its full name; None for one that is in none.

    Example:
        >>> layer_number("model.layers.3.mlp.experts.5.up_proj")
        3
    """
    found = NUMBERED.match(name)
    return int(found["number"]) if found else None


def layers_of(model: torch.nn.Module, names: Iterable[str]) -> list[torch.nn.Module]:
    """The model's layers, in their order, found by the names of modules in them.

    Raises:
        ValueError: where the modules are in no layers, or in several lists of layers.
    """
    lists = {found["list"] for name in names if (found := NUMBERED.match(name))}
    if len(lists) != 1:
        raise ValueError(
            f"EoRA: the quantised modules are in {len(lists)} lists of layers ({sorted(lists)}); expected one."
        )
    return list(model.get_submodule(lists.pop()).children())


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


def solving_cost(out_features: int, in_features: int) -> float:
    """About how many multiplications quantising and compensating a module takes.

    GPTQ spreads the error of each column over all later ones (out · in² / 2) and inverts the Hessian (in³). The solver
    multiplies ΔW and C some times by a few hundred columns, which has the same shape; only how modules compare counts.
    """
    return out_features * in_features**2 / 2 + in_features**3
