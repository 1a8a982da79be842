"""Blocks of Q4_0, Q8_0 and Q2_0: an adapter's factors are stored in the first two, GPTQ's symmetric weights in all.

Each cuts a row into blocks of 32 or 64 values with one float16 scale d: value = d · q.

    Q4_0, 32 in 18 bytes: d, then 16 bytes; byte j holds q[j] + 8 in its low half and q[j + 16] + 8 in its high half
    Q8_0, 32 in 34 bytes: d, then q[0] … q[31], two's complement
    Q2_0, 64 in 18 bytes: d, then 16 bytes; byte j holds q + 1 of values 4j to 4j + 3, the first in the lowest bits

Symmetric GPTQ has values s · (code − 2^(bits−1)), and so q from −8 to 7, −128 to 127 and −2 to 1. Q2_0 has q from −1 to
2: there d = −s and q = 2 − code.
"""

from __future__ import annotations

import numpy as np
import torch

from ..factors import FactorLayout, QuantizedFactor, pack
from ..packed_weights import PackedWeight
from . import Q2_0, Q2_0_BLOCK, Q2_0_BYTES, GGUFError

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
    values = codes.contiguous().view(torch.uint8) if factor.bits == 8 else _nibbles((codes + 8).to(torch.uint8))
    return _joined(scales, values)


def from_blocks(data: torch.Tensor, bits: int, features: int) -> QuantizedFactor:
    """The factor that `to_blocks` made bytes of.

    Args:
        data: uint8, rows × bytes.
        bits: 4 or 8.
        features: values in a row, a multiple of 32.
    """
    rows = len(data)
    blocks = data.view(rows, features // BLOCK, -1)
    scales = blocks[:, :, :2].contiguous().view(torch.float16)[:, :, 0]
    values = blocks[:, :, 2:]
    if bits == 8:
        codes = values.contiguous().view(torch.int8)
    else:
        codes = torch.cat([values & 15, values >> 4], dim=2).to(torch.int8) - 8
    return QuantizedFactor(pack(codes.reshape(rows, features), bits), scales.contiguous(), bits, features, BLOCK)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 0 to 15, … × 32, as Q4_0 has them: the second half of a block in the high halves of its bytes."""
    first, second = codes.chunk(2, dim=-1)
    return first | (second << 4)


def _joined(scales: torch.Tensor, values: torch.Tensor) -> np.ndarray:
    """Rows of blocks, each its scale and then its values, of bytes in rows × blocks × bytes."""
    return torch.cat([scales, values], dim=2).flatten(1).contiguous().numpy()


# Bits of a symmetric weight → the type that holds it, and the values in its block.
WEIGHT_TYPES = {2: (Q2_0, Q2_0_BLOCK), 4: ("Q4_0", BLOCK), 8: ("Q8_0", BLOCK)}


def weight_blocks(weight: PackedWeight) -> tuple[str, np.ndarray]:
    """A symmetric GPTQ weight in blocks of ggml.

    Args:
        weight: packed, its inputs in the order of their groups.

    Returns:
        The type, and uint8, out × bytes. Scales are rounded to float16, which changes nothing where they are so stored.

    Raises:
        GGUFError: for a weight that no type holds; it names the module and why.
    """
    reason = _unfit(weight)
    if reason is not None:
        raise GGUFError(f"{weight.name}: {reason}")
    kind, block = WEIGHT_TYPES[weight.bits]
    codes = weight.codes().T.contiguous().view(weight.out_features, -1, block)
    per_block = weight.group_of_input()[::block]
    scales = weight.scales.to(torch.float16)[per_block].T.contiguous()
    middle = 1 << (weight.bits - 1)
    if kind == Q2_0:
        scales = -scales
        quarters = (3 - codes).to(torch.uint8).view(weight.out_features, -1, block // 4, 4)
        values = quarters[..., 0] | quarters[..., 1] << 2 | quarters[..., 2] << 4 | quarters[..., 3] << 6
    elif weight.bits == 8:
        values = (codes - middle).to(torch.int8).view(torch.uint8)
    else:
        values = _nibbles(codes.to(torch.uint8))
    stored = scales.view(torch.uint8).view(weight.out_features, -1, 2)
    return kind, _joined(stored, values)


def _unfit(weight: PackedWeight) -> str | None:
    """Why no type of ggml holds a weight as it is; None where one does."""
    if weight.bits not in WEIGHT_TYPES:
        return f"{weight.bits} bits fit no type of ggml. Export 2, 4 or 8 bits, or quantise by llama-quantize."
    kind, block = WEIGHT_TYPES[weight.bits]
    if not weight.ordered:
        return "its inputs are in the order of desc_act, which no type of ggml holds. Quantise with desc_act=False."
    if weight.row_group_size % block or weight.in_features % block:
        return (
            f"groups of {weight.row_group_size} inputs and rows of {weight.in_features} are no whole blocks of {block} "
            f"for {kind}. Quantise in groups of a multiple of {block}."
        )
    if not bool((weight.zeros() == 1 << (weight.bits - 1)).all()):
        return f"its zero points are not all {1 << (weight.bits - 1)}, and {kind} is symmetric. Quantise with sym=True."
    return None


def read_q2_0(data: np.ndarray) -> np.ndarray:
    """Values of rows of Q2_0 blocks.

    Args:
        data: uint8, rows × bytes.

    Returns:
        float32, rows × values.
    """
    blocks = np.ascontiguousarray(data).reshape(-1, Q2_0_BYTES)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)
    codes = (blocks[:, 2:, None] >> shifts) & 3
    values = scales * (codes.reshape(-1, Q2_0_BLOCK).astype(np.float32) - 1)
    return values.reshape(data.shape[0], -1)
