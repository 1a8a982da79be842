"""The compiled CUDA kernels as a library for the CPU (`emulated.h`): their own sources, without a GPU."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from gptqmodel_eora_ext.kernels.cpu.build import MORE_FLAGS
from gptqmodel_eora_ext.kernels.cuda.build import SOURCES, declared
from gptqmodel_eora_ext.kernels.cuda.few_rows import Device

COMPILER = os.environ.get("CXX", "c++")
# Of an H100; fewer multiprocessors, so that small shapes are cut as large ones are there.
MEMORY = 227 * 1024
PROCESSORS = 6


@functools.cache
def library() -> ctypes.CDLL:
    """The library, compiled once a process."""
    folder = tempfile.TemporaryDirectory(prefix="eora-emulated-")
    path = Path(folder.name, "emulated.so")
    command = [
        COMPILER, "-O1", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas",
        "-Wno-missing-field-initializers", *shlex.split(os.environ.get(MORE_FLAGS, "")),
        "-include", str(Path(__file__).with_name("emulated.h")), "-x", "c++", str(SOURCES / "entry.cu"),
        "-o", str(path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    loaded = declared(ctypes.CDLL(str(path)))
    folder.cleanup()
    return loaded


def device(processors: int = PROCESSORS, memory: int = MEMORY) -> Device:
    """A device that the emulation stands for."""
    return Device(library(), processors, memory, hopper=True)
