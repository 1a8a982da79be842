"""The random cases of `cases.py` where Triton's kernels run: on this machine's GPU, or interpreted on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from triton import knobs

from gptqmodel_eora_ext.formats.factors import Factors
from gptqmodel_eora_ext.formats.packed_weights import PackedWeight

from . import cases

DEVICE = torch.device("cpu" if knobs.runtime.interpret else "cuda")


def packed_weight(*args: Any, **options: Any) -> PackedWeight:
    return cases.packed_weight(*args, **options).to(DEVICE)


def random_factors(*args: Any, **options: Any) -> Factors:
    made = cases.random_factors(*args, **options)
    return Factors(made.down.to(DEVICE), made.up.to(DEVICE))


def random_input(*args: Any, **options: Any) -> torch.Tensor:
    return cases.random_input(*args, **options).to(DEVICE)
