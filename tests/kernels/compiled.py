"""What the launches of the Triton operators compile to, for any target and without a GPU."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from gptqmodel_eora_ext.kernels.triton import ops

# Target → bytes of shared memory that a program may take there (CUDA programming guide, table of technical
# specifications: the opt-in limit of a block; AMD: 64 KiB of LDS).
TARGETS = {
    GPUTarget("cuda", 80, 32): 163 * 1024,
    GPUTarget("cuda", 86, 32): 99 * 1024,
    GPUTarget("cuda", 89, 32): 99 * 1024,
    GPUTarget("cuda", 90, 32): 227 * 1024,
    GPUTarget("cuda", 100, 32): 227 * 1024,
    GPUTarget("cuda", 120, 32): 99 * 1024,
    GPUTarget("hip", "gfx942", 64): 64 * 1024,
}
KERNELS = ("shrink_kernel", "gemv_kernel", "gemm_kernel", "shrink_expand_kernel")


@dataclass(frozen=True)
class Compiled:
    """One kernel as built for one target: bytes of shared memory, registers a thread, bytes of registers spilled."""

    kernel: str
    shared: int
    registers: int
    spilled: int
    assembly: str


@contextlib.contextmanager
def launches(processors: int) -> Iterator[list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]]]:
    """Collect the launches that operators called inside make, in place of running them."""
    found: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []

    def collect(kernel: JITFunction) -> Callable[..., None]:
        return lambda *args, grid, warmup, **options: found.append((kernel, args, options))

    kernels = [getattr(ops, name) for name in KERNELS]
    count = ops._processors
    for kernel in kernels:
        kernel.run = collect(kernel)
    ops._processors = lambda device: processors  # type: ignore[assignment]
    try:
        yield found
    finally:
        ops._processors = count
        for kernel in kernels:
            del kernel.run


def build(kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any], target: GPUTarget) -> Compiled:
    """Compile a launch as Triton would on a device of that target."""
    backend = make_backend(target)
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **options
    )
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=target, options=parsed.__dict__)
    name = kernel.fn.__name__
    if target.backend == "hip":
        assembly = made.asm["amdgcn"]
        spilled = sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count: +(\d+)", assembly))
        registers = max(int(count) for count in re.findall(r"\.vgpr_count: +(\d+)", assembly))
    else:
        assembly = made.asm["ptx"]
        usage = resource_usage(made.asm["cubin"])
        spilled, registers = usage["STACK"] + usage["LOCAL"], usage["REG"]
    return Compiled(name, made.metadata.shared, registers, spilled, assembly)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL and so on, as `cuobjdump` reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", report.stdout)}
