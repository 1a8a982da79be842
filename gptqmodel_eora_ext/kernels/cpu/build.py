"""The CPU's compiled kernels: where they are kept, how they are built and loaded (`kernels.compiling`)."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shlex
import sys
from pathlib import Path

from ...formats.packed_weights import LayoutError
from .. import compiling
from ..compiling import BuildError

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# Each instruction set's file carries its own target attribute; nothing is compiled for the machine that builds.
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", *(("-fopenmp",) if sys.platform == "linux" else ()))
# More flags for the compiler, for instance a sanitizer's (`make asan`); a library of its own is built for them.
MORE_FLAGS = "GPTQMODEL_EORA_EXT_CXXFLAGS"
ISAS = ("portable", "avx2", "avx512", "avx512-bf16")


def flags() -> tuple[str, ...]:
    """What the compiler is told."""
    return (*FLAGS, *shlex.split(os.environ.get(MORE_FLAGS, "")))


def library_path() -> Path:
    """Where the library of these sources is kept."""
    return compiling.library_path("eora_cpu", SOURCES, flags())


def build() -> Path:
    """Compile the kernels, unless they are there, and return the library's path.

    Raises:
        BuildError: as `compiling.build`.
    """
    linking = [flag for flag in flags() if flag == "-fopenmp" or flag.startswith("-fsanitize")]
    return compiling.build(library_path(), sorted(SOURCES.glob("*.cpp")), flags(), linking)


# What the compiled functions refuse, in the order of `Fault` of csrc/check.h.
FAULTS = (
    "", "bits", "features, rank or units", "a dtype", "codes", "scales", "zeros", "starts of segments",
    "order of inputs", "A", "scales of A", "B", "scales of B", "bias", "x", "y", "x Aᵀ",
    "layers that do not read the same x", "an instruction set that the processor lacks", "threads", "places of inputs",
    "members", "weights of members",
)  # fmt: skip


def require_fine(fault: int, name: str = "CPU kernels") -> None:
    """Raise what a compiled function returned.

    Args:
        fault: index into `FAULTS`; 0 for none.
        name: the module, for the message.

    Raises:
        LayoutError: for any other number than 0.
    """
    if fault:
        what = FAULTS[fault] if 0 < fault < len(FAULTS) else f"fault {fault}"
        raise LayoutError(
            f"{name}: the compiled kernels refuse {what}: what they were handed has other sizes than the layer. "
            f"Nothing was computed. Load the checkpoint and its adapter again; if that does not help, one is damaged."
        )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels; None, told once in the log, where they cannot be compiled or loaded."""
    try:
        loaded = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        log.warning("EoRA: no CPU kernels (%s); torch is used, which is slow at 2 and 3 bits. Install a C++ compiler, "
                    "then run: python -m gptqmodel_eora_ext.kernels.cpu --build", error)  # fmt: skip
        return None
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    memory = (pointer, long)
    loaded.eora_check.argtypes = (pointer,)
    loaded.eora_repack.argtypes = (*memory, *memory, integer, integer, integer, integer, *memory, integer)
    loaded.eora_unpack.argtypes = loaded.eora_repack.argtypes
    loaded.eora_linears.argtypes = (pointer, integer, *memory, integer, integer, *memory, *memory, integer, integer)
    loaded.eora_components.argtypes = (pointer, integer, *memory, integer, integer, *memory, integer, integer)
    loaded.eora_dequantize.argtypes = (pointer, integer, integer, *memory, long, integer, integer)
    loaded.eora_matmul.argtypes = (pointer, *memory, *memory, integer, *memory, *memory, long, integer)
    loaded.eora_large_pages.argtypes = (pointer, long)
    loaded.eora_large_pages.restype = None
    return loaded


def best_isa() -> int:
    """Index into `ISAS` of the best instruction set that this processor has."""
    loaded = library()
    assert loaded is not None
    return int(loaded.eora_best_isa())
