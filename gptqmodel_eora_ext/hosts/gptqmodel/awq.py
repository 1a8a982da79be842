"""Bring a full-precision model into the coordinates of an AWQ checkpoint made from it.

AWQ moves scales s between layers before it quantises: a norm (or the linear before) is divided by s, the columns of
the linears that read it are multiplied by s. The model computes the same; its weights differ. An adapter corrects the
checkpoint's weights, so the full-precision weights it is compared with must carry the same scales.

For a norm, s is read off exactly: native norm weight / checkpoint's. For a linear before, s is the least-squares fit
of the quantised columns to the native ones. The fit needs no precision: the same s divides one weight and multiplies
the other, so the rewritten model is equivalent to the native one for any s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization.awq.quantize.scale import apply_scale
from gptqmodel.quantization.awq.utils.module import get_op_name
from gptqmodel.utils.model import get_layers_with_prefixes

from .known_weights import dequantize

# Largest relative difference between the two models' norms once s is moved: bfloat16 keeps 8 bits, and each side has
# been rounded.
NORM_TOLERANCE = 2**-6


class _AnyFeature(dict[str, torch.Tensor]):
    """In place of captured activations, for GPTQModel's grouping of modules, which asks only whether they are there."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> torch.Tensor:
        return torch.empty(0)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name]


def move_scales(model: Any, norms: Mapping[str, torch.Tensor], kernels: Mapping[str, BaseQuantLinear]) -> None:
    """Rewrite the native model's weights in place.

    Args:
        model: GPTQModel's model, full precision, weights in memory.
        norms: parameters of the checkpoint's modules that are not quantised, by full name.
        kernels: the checkpoint's quantised linears, by full name.

    Raises:
        NotImplementedError: where the checkpoint's scales cannot be read off its weights.
    """
    layers, names = get_layers_with_prefixes(model.model, model.extract_layers_node())
    for layer, layer_name in zip(layers, names, strict=True):
        for group in model.awq_get_modules_for_scaling(layer, _AnyFeature(), {}):
            previous = get_op_name(layer, group["prev_op"])
            readers = [get_op_name(layer, linear) for linear in group["layers"]]
            readers = [name for name in readers if f"{layer_name}.{name}" in kernels]
            if not readers:
                continue
            full_previous = f"{layer_name}.{previous}"
            if full_previous in kernels:
                scales = _fit(layer, layer_name, readers, kernels)
            elif f"{full_previous}.weight" in norms:
                scales = _ratio(group["prev_op"].weight.data, norms[f"{full_previous}.weight"])
            else:
                raise NotImplementedError(
                    f"EoRA: {full_previous} has no weight in the checkpoint to read AWQ's scales from."
                )
            apply_scale(layer, [(previous, readers, scales, None)])
            if full_previous not in kernels:
                _check_norm(full_previous, group["prev_op"].weight.data, norms[f"{full_previous}.weight"])


def _ratio(native: torch.Tensor, checkpoint: torch.Tensor) -> torch.Tensor:
    """The scale of each channel of a norm, float32; 1 where the quotient is no positive number."""
    native, checkpoint = native.to(torch.float32), checkpoint.to(native.device, torch.float32)
    ratio = native / checkpoint
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))


def _fit(
    layer: torch.nn.Module, layer_name: str, readers: list[str], kernels: Mapping[str, BaseQuantLinear]
) -> torch.Tensor:
    """The scale of each input column of weights that read the same input, by least squares, float32."""
    # Their columns have the same scales, so the weights count as one tall weight.
    native = torch.cat([layer.get_parameter(f"{name}.weight").data.to(torch.float32) for name in readers])
    quantized = torch.cat([dequantize(kernels[f"{layer_name}.{name}"]) for name in readers])
    fitted = (native * quantized.to(native.device, torch.float32)).sum(0) / native.square().sum(0)
    return torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, torch.ones_like(fitted))


def _check_norm(name: str, moved: torch.Tensor, checkpoint: torch.Tensor) -> None:
    """Refuse a norm that, once the scales are moved, is not the checkpoint's."""
    moved, checkpoint = moved.to(torch.float32), checkpoint.to(moved.device, torch.float32)
    gap = float((moved - checkpoint).norm() / checkpoint.norm())
    if not gap <= NORM_TOLERANCE:
        raise NotImplementedError(
            f"EoRA: {name} of the full-precision model cannot be brought to the AWQ checkpoint's (they differ by "
            f"{gap:.1%}, expected at most {NORM_TOLERANCE:.1%}). Is it the checkpoint's base?"
        )
