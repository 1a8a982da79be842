"""What launches of every kind ask of a device and of a tensor; no Triton here."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import torch

# Bytes of which an address is a multiple or not.
ALIGNMENT = 16
# Under Triton's interpreter there are no multiprocessors; with this many, small shapes are split as large ones are.
INTERPRETED_PROCESSORS = 4
# Why weights are refused while a compiler traces.
UNCOMPILED = (
    "EoRA: an ensemble's weights change from call to call, so that it cannot be compiled. Load one adapter for that."
)


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether all begin where the allocator lets tensors begin; slices may not."""
    return not any(tensor.data_ptr() % ALIGNMENT for tensor in tensors)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device: make it the one where the tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def at_once(device: torch.device) -> int:
    """Programs that run at the same time; interpreted ones run one after the other."""
    return processors(device) if device.type == "cuda" else 1


def traced(x: torch.Tensor) -> bool:
    """Whether somebody looks on: a compiler, or a tensor that stands for another."""
    return torch.compiler.is_compiling() or type(x) is not torch.Tensor
