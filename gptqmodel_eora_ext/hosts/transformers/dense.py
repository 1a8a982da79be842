"""Ŵ of a module that transformers has loaded: by the format's own dequantisation, else by running the module.

Each format is one function, which returns None for what is not its own. What none of them knows is run on rows of the
identity matrix: every sum has one term then, so the outputs are Ŵ's columns, exact to the module's dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from ...adapter.layers import oriented

# Rows of the identity that are run together: at 8192 outputs in 16 bits they take 4 MiB.
IDENTITY_ROWS = 256
# Factors by which the identity is scaled to find out whether a module quantises its inputs by a fixed scale. Powers of
# two change no digit of a floating number, so that a module without such a scale gives the same digits.
PROBES = (0.25, 64.0)


def dense_weight(module: torch.nn.Module, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Return Ŵ, out × in, float32.

    Args:
        module: a linear layer of any format, on any device.
        name: its full name, for messages.
        dtype: of its inputs, should it have to be run.

    Raises:
        NotImplementedError: for a module that quantises its inputs by fixed scales, or that is no linear layer.
    """
    with torch.no_grad():
        for known in (_plain, _compressed_tensors, _bitsandbytes, _torchao):
            found = known(module)
            if found is not None:
                return oriented(module, found).to(torch.float32)
        return weight_by_identity(module, name, dtype)


def _plain(module: torch.nn.Module) -> torch.Tensor | None:
    weight: Any = getattr(module, "weight", None)
    if type(weight) not in (torch.nn.Parameter, torch.Tensor) or hasattr(module, "quantization_scheme"):
        return None
    plain = weight.ndim == 2 and weight.is_floating_point() and weight.element_size() > 1
    return weight.detach() if plain else None


def _compressed_tensors(module: torch.nn.Module) -> torch.Tensor | None:
    if getattr(module, "quantization_scheme", None) is None:
        return None
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.quantization import QuantizationStatus

    # It replaces the packed tensors by the weight. A second call finds the weight already.
    if getattr(module, "quantization_status", None) == QuantizationStatus.COMPRESSED:
        decompress_module(module)
    weight: Any = module.weight
    return weight.detach()  # type: ignore[no-any-return]


def _bitsandbytes(module: torch.nn.Module) -> torch.Tensor | None:
    if not type(module).__module__.startswith("bitsandbytes."):
        return None
    from bitsandbytes import functional

    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return functional.dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]
    scales = getattr(weight, "SCB", None)
    return functional.int8_vectorwise_dequant(weight.data, scales) if scales is not None else None  # type: ignore[no-any-return]


def _torchao(module: torch.nn.Module) -> torch.Tensor | None:
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not type(weight).__module__.startswith("torchao."):
        return None
    return weight.dequantize()  # type: ignore[no-any-return]


def weight_by_identity(module: torch.nn.Module, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Run a linear layer on the rows of the identity matrix: Ŵ, out × in, float32, exact to ``dtype``.

    A module that quantises its inputs by a scale found from each row gives Ŵ all the same, since a row of the identity
    is rounded to itself. One with a fixed scale does not, and is refused.

    Args:
        module: y = x Ŵᵀ + bias, with `in_features`.
        name: its full name, for messages.
        dtype: of its inputs.

    Raises:
        NotImplementedError: naming the module, when outputs do not scale with the inputs.
    """
    width = getattr(module, "in_features", None)
    if not isinstance(width, int):
        raise NotImplementedError(f"EoRA: {name} is a {type(module).__name__}, which tells no `in_features`: it is no "
                                  f"linear layer that could be dequantised.")  # fmt: skip
    device = next((one.device for one in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    bias = getattr(module, "bias", None)
    if bias is not None:
        module.bias = None  # type: ignore[assignment]
    try:
        columns = []
        for start in range(0, width, IDENTITY_ROWS):
            rows = torch.zeros(min(IDENTITY_ROWS, width - start), width, dtype=dtype, device=device)
            rows[:, start:].fill_diagonal_(1)
            found = module(rows)
            if start == 0:
                _require_linear(module, rows, found, name)
            columns.append(found.to(torch.float32).T)
    finally:
        if bias is not None:
            module.bias = bias
    return torch.cat(columns, dim=1)


def _require_linear(module: torch.nn.Module, rows: torch.Tensor, found: torch.Tensor, name: str) -> None:
    for factor in PROBES:
        if not torch.equal(module(rows * factor), found * factor):
            raise NotImplementedError(
                f"EoRA: {name} ({type(module).__name__}) gives other digits for inputs {factor:g} times as large, so "
                f"it quantises its inputs by a fixed scale. Its weight cannot be told from its outputs. Compress the "
                f"model's weights alone."
            )
