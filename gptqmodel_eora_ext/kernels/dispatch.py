"""Which kernel multiplies: by device, dtype, bits, rank and rows; and, for people, why not a faster one.

`GPTQMODEL_EORA_EXT_KERNELS_OFF` names, separated by commas, what is not to be used: paths (`cpu-codes`, `cpu-matmul`,
`cpu-tiles`, `triton`, `triton-correction`), instruction sets (`avx512-bf16`, `avx512`, `avx2`), or `all`.
`GPTQMODEL_EORA_EXT_KERNELS_ON` names what is used only where somebody asks for it: `cuda`. Both are read when a model
is loaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..formats.packed_weights import WEIGHT_BITS
from .cpu.build import ISAS, best_isa, library
from .triton import runs_on

SWITCH = "GPTQMODEL_EORA_EXT_KERNELS_OFF"
ASKED = "GPTQMODEL_EORA_EXT_KERNELS_ON"
ALL = "all"

CODES = "cpu-codes"
MATMUL = "cpu-matmul"
TILES = "cpu-tiles"
TRITON = "triton"
# NVIDIA's compiled kernels (`kernels.cuda`) within that path: asked for, since no GPU has run them yet.
CUDA = "cuda"
# The adapter alone, on the output of a kernel that is not ours.
CORRECTION = "triton-correction"
TORCH = "torch"

# Rows up to which multiplying the codes themselves takes less time than dequantising for it: at 4096 × 4096, 2 bits,
# two cores, the two meet here in bfloat16. In float32 and float16 codes with AVX-512 are ahead at 256 rows still, so
# they are taken for any number. Not measured on a processor without AVX-512.
FEW_ROWS = 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """A kernel, and what stands in the way of a faster one.

    Attributes:
        path: one of `CODES`, `MATMUL`, `TILES`, `TRITON`, `TORCH`.
        isa: index into `cpu.build.ISAS`; 0 for `TRITON` and `TORCH`.
        reason: why not a faster one; empty for the fastest.
    """

    path: str
    isa: int = 0
    reason: str = ""

    def __str__(self) -> str:
        return self.path if self.path in (TRITON, TORCH) else f"{self.path} ({ISAS[self.isa]})"


def switched_off() -> frozenset[str]:
    """What the environment says is not to be used."""
    return _names(SWITCH)


def asked_for() -> frozenset[str]:
    """What the environment says is to be used although it is not by itself."""
    return _names(ASKED)


def _names(variable: str) -> frozenset[str]:
    return frozenset(name.strip() for name in os.environ.get(variable, "").lower().split(",") if name.strip())


def choose(
    device: torch.device | str, dtype: torch.dtype, bits: int, rows: int, off: frozenset[str] = frozenset()
) -> Choice:
    """The fastest kernel that can be used.

    Args:
        device: of the weight and x.
        dtype: of x.
        bits: of a code.
        rows: of x.
        off: names that are not to be used (`switched_off`).
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return Choice(TORCH, reason=f"there is no kernel for {device.type}")
    if bits not in WEIGHT_BITS:
        return Choice(TORCH, reason=f"the kernels read {', '.join(map(str, WEIGHT_BITS))} bits, not {bits}")
    if dtype not in DTYPES:
        return Choice(TORCH, reason=f"the kernels take float32, float16 and bfloat16, not {str(dtype)[6:]}")
    if ALL in off:
        return Choice(TORCH, reason=f"{SWITCH}={ALL}")
    if device.type == "cuda":
        if TRITON in off:
            return Choice(TORCH, reason=f"{TRITON} is off by {SWITCH}")
        return Choice(TRITON) if runs_on(device) else Choice(TORCH, reason="Triton is not installed")
    if library() is None:
        return Choice(TORCH, reason="the CPU kernels could not be compiled; the log tells why")
    isa, reason = _usable_isa(off)
    wide = ISAS[isa].startswith("avx512")
    ranking = [CODES, TILES]
    if rows > FEW_ROWS and not wide:
        ranking = [TILES, CODES]
    if rows > FEW_ROWS and dtype == torch.bfloat16 and ISAS[isa] == "avx512-bf16":
        ranking = [MATMUL, CODES, TILES]
    for path in ranking:
        if path not in off:
            return Choice(path, isa, reason)
        reason = f"{path} is off by {SWITCH}"
    return Choice(TORCH, reason=reason)


def _usable_isa(off: frozenset[str]) -> tuple[int, str]:
    best = best_isa()
    usable = next(index for index in range(best, -1, -1) if index == 0 or ISAS[index] not in off)
    if usable < best:
        return usable, f"{ISAS[best]} is off by {SWITCH}"
    return usable, "" if usable == len(ISAS) - 1 else f"the processor has no {ISAS[usable + 1]}"
