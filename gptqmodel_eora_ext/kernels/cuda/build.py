"""NVIDIA's compiled kernels: where they are kept, how they are built and loaded (`kernels.compiling`).

They want NVIDIA's compiler, of the version of CUDA that torch was built for, and a GPU of compute capability 8.0 or
later. Without one of these Triton's kernels serve.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch

from .. import compiling
from ..compiling import BuildError
from .few_rows import Device
from .structures import MOST_MODULES

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# The oldest whose instructions the kernels use: asynchronous copies, bfloat16 on tensor cores.
OLDEST = (8, 0)
# The one whose tensor cores the kernel for many rows is written for.
HOPPER = (9, 0)
# From here on, architectures have instructions that only code made for this very one may use.
FIRST_OF_ITS_OWN = (9, 0)


def flags(capability: tuple[int, int]) -> tuple[str, ...]:
    """What NVIDIA's compiler is told for devices of a compute capability."""
    number = f"{capability[0]}{capability[1]}{'a' if capability >= FIRST_OF_ITS_OWN else ''}"
    return ("-O3", "-std=c++17", f"-gencode=arch=compute_{number},code=sm_{number}")


def build(capability: tuple[int, int]) -> Path:
    """Compile the kernels for a compute capability, unless they are there, and return the library's path.

    Raises:
        BuildError: as `compiling.build`.
    """
    path = compiling.library_path("eora_cuda", SOURCES, flags(capability))
    return compiling.build(path, sorted(SOURCES.glob("*.cu")), flags(capability), cuda=True)


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    pointer = ctypes.c_void_p
    loaded.eora_few_rows_bytes.argtypes = (pointer,)
    for modules in range(1, MOST_MODULES + 1):
        getattr(loaded, f"eora_few_rows_{modules}").argtypes = (pointer,) * (3 + modules)
    loaded.eora_many_rows.argtypes = (*(pointer,) * 4, ctypes.c_int, *(pointer,) * 4)
    loaded.eora_allow_memory.argtypes = (ctypes.c_int, ctypes.c_int)
    return loaded


@functools.cache
def library(capability: tuple[int, int]) -> ctypes.CDLL | None:
    """The loaded kernels for devices of a capability; None, told once in the log, where there can be none."""
    if capability < OLDEST or torch.version.cuda is None:
        return None
    try:
        return declared(ctypes.CDLL(str(build(capability))))
    except (BuildError, OSError) as error:
        log.warning("EoRA: no compiled CUDA kernels (%s); Triton's serve. Install CUDA's toolkit %s, then run: "
                    "python -m gptqmodel_eora_ext.kernels.cuda --build", error, torch.version.cuda)  # fmt: skip
        return None


@functools.cache
def device_of(device: torch.device) -> Device | None:
    """What launches depend on of a CUDA device, on which the kernels may take all shared memory from now on; None where
    they are not to be had."""
    loaded = library(torch.cuda.get_device_capability(device))
    if loaded is None:
        return None
    properties = torch.cuda.get_device_properties(device)
    memory = int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    hopper = (properties.major, properties.minor) == HOPPER
    with torch.cuda.device(device):
        fault = loaded.eora_allow_memory(memory, hopper)
    if fault:
        log.warning("EoRA: CUDA refuses %d bytes of shared memory (error %d); Triton's kernels serve.", memory, fault)
        return None
    return Device(loaded, properties.multi_processor_count, memory, hopper)
