"""A module's factors as they are sent from process to process: figures in JSON, and tensors beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..formats.factors import QuantizedFactor
from .factors import ModuleFactors

FIGURES = ("requested_rank", "tokens", "signal", "error_before", "error_after")


def carried(factors: ModuleFactors) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Figures, ready for JSON, and tensors by name, from which `received` makes the same factors."""
    figures: dict[str, Any] = {name: getattr(factors, name) for name in FIGURES}
    tensors = {"lora_A": factors.lora_A, "lora_B": factors.lora_B}
    if factors.packed is not None:
        figures["packed"] = [[one.bits, one.features, one.group_size] for one in factors.packed]
        for index, one in enumerate(factors.packed):
            tensors |= {f"codes {index}": one.codes, f"scales {index}": one.scales}
    return figures, tensors


def received(figures: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> ModuleFactors:
    """The factors that `carried` has taken apart."""
    packed = None
    if "packed" in figures:
        first, second = (
            QuantizedFactor(tensors[f"codes {index}"], tensors[f"scales {index}"], *shape)
            for index, shape in enumerate(figures["packed"])
        )
        packed = (first, second)
    told = {name: figures[name] for name in FIGURES}
    return ModuleFactors(tensors["lora_A"], tensors["lora_B"], packed=packed, **told)
