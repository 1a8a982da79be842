"""Blocks of Q4_0 and Q8_0, the types that factors of an adapter are stored in.

Both cut a row into blocks of 32 values with one float16 scale d: value = d · q.

    Q4_0, 18 bytes: d, then 16 bytes; byte j holds q[j] + 8 in its low half and q[j + 16] + 8 in its high half
    Q8_0, 34 bytes: d, then q[0] … q[31], two's complement
"""

from __future__ import annotations

import numpy as np
import torch

from ..factors import FactorLayout, QuantizedFactor
from . import GGUFError

BLOCK = 32
TYPES = {4: "Q4_0", 8: "Q8_0"}
# In A a row of blocks is a component; in B it is an output, and its blocks run over the components. llama.cpp
# multiplies whole blocks, so that a rank is a multiple of 32.
GGUF_LAYOUT = FactorLayout(BLOCK, along_rank=True, multiple=BLOCK, step=BLOCK)


def to_blocks(factor: QuantizedFactor) -> np.ndarray:
    """The bytes of a factor.

    Args:
        factor: with a group size of 32, its features a multiple of it.

    Returns:
        uint8, rows × bytes.

    Raises:
        GGUFError: for another group size or width.
    """
    if factor.group_size != BLOCK or factor.features % BLOCK:
        raise GGUFError(
            f"a factor of {factor.features} features in groups of {factor.group_size} is no factor of whole blocks of "
            f"{BLOCK}."
        )
    rows = factor.codes.shape[0]
    scales = factor.scales.cpu().contiguous().view(torch.uint8).view(rows, -1, 2)
    codes = factor.integers().cpu().view(rows, -1, BLOCK)
    if factor.bits == 8:
        values = codes.contiguous().view(torch.uint8)
    else:
        halves = (codes + 8).to(torch.uint8)
        values = halves[:, :, : BLOCK // 2] | (halves[:, :, BLOCK // 2 :] << 4)
    return torch.cat([scales, values], dim=2).flatten(1).contiguous().numpy()
