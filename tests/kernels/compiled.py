"""What the launches of the Triton operators compile to, for any target and without a GPU.

    python -m tests.kernels.compiled

compiles every setting for every target, which takes a quarter of an hour; `test_triton_compile.py` takes a few.
"""

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

from gptqmodel_eora_ext.kernels.triton import adding, ops
from gptqmodel_eora_ext.kernels.triton.dense import dequantize_kernel

from .cases import packed_weight, random_factors

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
RANK = 64
PROCESSORS = 132
KERNELS = (
    ops.shrink_kernel, ops.gemv_kernel, ops.gemm_kernel, adding.correction_kernel, dequantize_kernel, ops.factor_kernel
)  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """One kernel as built for one target: bytes of shared memory, registers a thread, bytes of registers spilled."""

    kernel: str
    shared: int
    registers: int
    spilled: int
    assembly: str


@contextlib.contextmanager
def collected(processors: int) -> Iterator[list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]]]:
    """Collect the launches that operators called inside make, in place of running them."""
    found: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []

    def collect(kernel: JITFunction) -> Callable[..., None]:
        return lambda *args, grid, warmup, **options: found.append((kernel, args, options))

    counts = ops.processors, adding.at_once
    for kernel in KERNELS:
        kernel.run = collect(kernel)
    ops.processors = adding.at_once = lambda device: processors  # type: ignore[assignment]
    try:
        yield found
    finally:
        ops.processors, adding.at_once = counts
        for kernel in KERNELS:
            del kernel.run


def compiled(kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any], target: GPUTarget) -> Any:
    """Triton's own result of compiling a launch as it would on a device of that target."""
    backend = make_backend(target)
    if target.backend == "hip":
        # `Settings.options` leaves it out where torch is built for ROCm.
        options = {name: value for name, value in options.items() if name != "maxnreg"}
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **options
    )
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=parsed.__dict__)


def build(kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any], target: GPUTarget) -> Compiled:
    """What a launch takes on a device of that target."""
    made = compiled(kernel, args, options, target)
    name = kernel.fn.__name__
    if target.backend == "hip":
        assembly = made.asm["amdgcn"]
        # Where scalar registers do not suffice, lanes of vector registers hold the rest; only what those spill, and the
        # private segment, is memory.
        spilled = sum(
            int(count) for count in re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size): +(\d+)", assembly)
        )
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


@dataclass(frozen=True)
class Case:
    """One call of `StackedLinears`, or for ``bits`` None of `add_correction`."""

    bits: int | None
    rows: int
    dtype: torch.dtype = torch.float16
    factor_bits: int = 16
    desc_act: bool = False
    sym: bool = False
    in_features: int = 1024
    outs: tuple[int, ...] = (1024,)

    def launches(self) -> list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]]:
        """The launches of the call on a device of `PROCESSORS` multiprocessors."""
        x = torch.zeros(self.rows, self.in_features, dtype=self.dtype)
        if self.bits is None:
            down, up = (torch.zeros(RANK, features, dtype=self.dtype) for features in (self.in_features, *self.outs))
            with collected(PROCESSORS) as found:
                adding.add_correction(x, down, up, torch.zeros(self.rows, *self.outs, dtype=self.dtype), slot=5)
            return found
        weights = [
            packed_weight(self.bits, out, self.in_features, 128, sym=self.sym, desc_act=self.desc_act)
            for out in self.outs
        ]
        factors_of = [random_factors(weight, RANK, self.factor_bits) for weight in weights]
        biases = [torch.zeros(out, dtype=self.dtype) for out in self.outs]
        fused = ops.StackedLinears.prepare(weights, factors_of, biases)
        with collected(PROCESSORS) as found:
            fused(x)
        return found


def all_cases() -> list[Case]:
    """Every tile of `settings.py` at every width in float16, and of each further variant the tiles that need most."""
    widths = (2, 3, 4, 8)
    most = (1, 64, 512)
    return [
        *(
            Case(None, rows, dtype, in_features=4096, outs=(out,))
            for dtype in (torch.float16, torch.bfloat16, torch.float32)
            for rows in (1, 16)
            for out in (1024, 12288)
        ),
        *(Case(bits, rows) for bits in widths for rows in (1, 16, 32, 64, 512)),
        *(Case(bits, rows, torch.bfloat16) for bits in widths for rows in most),
        *(Case(bits, rows, torch.float32) for bits in widths for rows in (1, 16)),
        *(Case(bits, rows, factor_bits=4, desc_act=True) for bits in widths for rows in most),
        *(Case(bits, rows, in_features=1000, sym=True) for bits in (2, 3) for rows in (1, 64)),
        *(Case(bits, rows, outs=(1024, 256, 256)) for bits in (2, 3) for rows in (1, 64)),
    ]


def main() -> None:
    """Compile everything for everything, print a table, and fail if anything spills or does not fit."""
    failed = 0
    print(f"{'target':8} {'kernel':21} {'case':88} {'registers':>9} {'spilled':>7} {'shared':>7}")
    for case in all_cases():
        for kernel, args, options in case.launches():
            for target, shared in TARGETS.items():
                made = build(kernel, args, options, target)
                fits = made.spilled == 0 and made.shared <= shared
                failed += not fits
                print(
                    f"{target.arch!s:8} {made.kernel:21} {case!s:88} {made.registers:9} {made.spilled:7} "
                    f"{made.shared:7}{'' if fits else '  FAILS'}",
                    flush=True,
                )
    raise SystemExit(f"{failed} kernels spill or do not fit" if failed else None)


if __name__ == "__main__":
    main()
