"""Giving memory back to the system, and where there is room for a whole model."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What sensitivities and forecasts take beside the weights: activations (2 GiB, `plan.sensitivity`), scores of a pass,
# and matrices of the modules under way. An estimate on the safe side, not a measurement.
WORKING_BYTES = 8 << 30


def release_free_memory() -> None:
    """Have glibc return free pages to the system; nothing on other systems.

    Compensation keeps small factors between large temporaries. Left alone, glibc's heaps grow by a layer's weights for
    every layer, all of it free but unreturned: 17 % of peak memory on SmolLM2.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def roomy_device(model: torch.nn.Module, wanted: torch.device) -> torch.device:
    """``wanted``, where the whole of ``model`` fits there beside `WORKING_BYTES`; else the CPU."""
    if wanted.type != "cuda":
        return wanted
    free, _ = torch.cuda.mem_get_info(wanted)
    # What torch holds in reserve counts as taken there.
    free += torch.cuda.memory_reserved(wanted) - torch.cuda.memory_allocated(wanted)
    moving = sum(one.nbytes for one in _tensors(model) if one.device != wanted)
    return wanted if moving + WORKING_BYTES <= free else torch.device("cpu")


@contextmanager
def on_one_device(model: torch.nn.Module) -> Iterator[None]:
    """Have all of a model on one device meanwhile, and each tensor where it was afterwards.

    A host that quantises block by block has one block on the GPU and the others on the CPU. The GPU is taken where it
    has room for all.
    """
    homes = [(one, one.device) for one in _tensors(model)]
    devices = {device for _, device in homes}
    if len(devices) < 2:
        yield
        return
    accelerator = min((device for device in devices if device.type != "cpu"), key=str)
    target = roomy_device(model, accelerator)
    try:
        for one, _ in homes:
            one.data = one.data.to(target)
        yield
    finally:
        for one, device in homes:
            one.data = one.data.to(device)


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(model.parameters(), model.buffers())
