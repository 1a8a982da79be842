"""Triton kernels for CUDA and ROCm: y = x Ŵᵀ + (x Aᵀ) Bᵀ + bias over packed weights, factors fused.

| file | launch |
|---|---|
| `shrink.py` | t = x Aᵀ, A of all modules that read x stacked |
| `gemv.py` | y of those modules, one row |
| `gemm.py` | y of those modules, some rows |
| `correction.py` | y += t Bᵀ on another kernel's output, few rows, t included |
| `dense.py` | Ŵ and packed factors as dense matrices, for so many rows that the vendor's product is faster |

`ops.py` wraps them as torch operators, `settings.py` cuts them into tiles, `launch.py` repeats launches.
Results were checked on an H100 and by Triton's interpreter, the code by compiling it for each target (docs/kernels.md).

Importing this package imports no Triton, which not every platform has; `ops` does.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

_INSTALLED = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def available() -> bool:
    """Whether Triton is installed."""
    return _INSTALLED


def runs_on(device: torch.device) -> bool:
    """Whether the kernels can read tensors of ``device``: CUDA and ROCm; any, where Triton interprets its kernels."""
    return _INSTALLED and (device.type == "cuda" or _INTERPRETED)
