"""How each launch is cut into tiles. Pure functions of the shape, so that every setting can be compiled beforehand.

None of these numbers was measured: no GPU was at hand. They follow from what tests/kernels/test_triton_compile.py
checks (no spilled register, shared memory that fits the smallest target) and from the reasons beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..layout import WORD_BITS

# Programs wanted per multiprocessor: a memory-bound program alone cannot keep enough reads in flight.
GEMV_PROGRAMS = 8
GEMM_PROGRAMS = 2
# 64 outputs: a row of words is read in two full 128-byte lines. 16 rows: a thread takes eight outputs of a unit, to
# which each value of x that it loads is common.
GEMV_COLUMNS = 64
GEMV_UNITS = 16
# With a scale and a zero to each weight, eight outputs to a thread spill.
GEMV_INDEXED_UNITS = 8
# NVIDIA's assembler spills a few bytes for the sake of occupancy where some kernels could have more registers; told
# that they may have so many, it does not. Of 128 threads, four programs of the first fit a multiprocessor, and three of
# the second, which the GEMV at 3 bits and tiles of 64 rows need.
FEWER_REGISTERS = 128
MORE_REGISTERS = 168
# Rank components per step without tensor cores.
GEMV_RANKS = 16
# Rank components per step on tensor cores: with 32, some tiles of 64 rows spill.
GEMM_RANKS = 16
# More splits than this cost more partial sums than they bring parallelism at 4096 inputs.
MOST_SPLITS = 16
# Inputs of one step of a tensor-core tile.
BLOCK_K = 64
SMALLEST_DOT = 16
FLOAT32_COLUMNS = 32


@dataclass(frozen=True)
class Settings:
    """The launch parameters of one kernel.

    Attributes:
        block_m: rows of x.
        block_n: outputs; for the shrink kernel 0.
        block_k: inputs, or units of codes for the GEMV.
        block_r: rank components.
        splits: parts that the inputs are cut into.
        per_split: inputs (units for the GEMV) of a part, a multiple of ``block_k``.
        num_warps: warps of a program.
        num_stages: steps that loads run ahead.
        registers: most registers of a thread on NVIDIA; None for what the assembler likes.
    """

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    splits: int
    per_split: int
    num_warps: int
    num_stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """What Triton is told beside the tiles."""
        told = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        # Triton for ROCm knows no such option.
        return told if self.registers is None or torch.version.hip else {**told, "maxnreg": self.registers}


def unit_codes(bits: int) -> int:
    """Codes of the shortest run that fills whole words."""
    return WORD_BITS if bits == 3 else WORD_BITS // bits


def window_codes(bits: int) -> int:
    """Codes that the GEMV takes from a word at a time."""
    return 4 if bits == 8 else 8


def tile_inputs(bits: int, group_size: int, in_features: int) -> int:
    """Inputs of a tile that lies within one group, at most `BLOCK_K`; 0 where groups allow none of a usable size."""
    if group_size >= in_features:
        return BLOCK_K
    power = group_size & -group_size
    return min(power, BLOCK_K) if power >= max(SMALLEST_DOT, unit_codes(bits)) else 0


def gemv(outs: Sequence[int], in_features: int, bits: int, indexed: bool, processors: int) -> Settings:
    """For `gemv.gemv_kernel`, one row; ``indexed`` where each input's group is looked up."""
    tiles = sum(-(-out // GEMV_COLUMNS) for out in outs)
    units = GEMV_INDEXED_UNITS if indexed else GEMV_UNITS
    splits, per_split = _split(-(-in_features // unit_codes(bits)), units, -(-GEMV_PROGRAMS * processors // tiles))
    limit = MORE_REGISTERS if bits == 3 and not indexed else None
    return Settings(1, GEMV_COLUMNS, units, GEMV_RANKS, splits, per_split, num_warps=4, num_stages=2, registers=limit)


def gemm(
    rows: int, outs: Sequence[int], in_features: int, block_k: int, dtype: torch.dtype, processors: int
) -> Settings:
    """For `gemm.gemm_kernel`; ``block_k`` from `tile_inputs`, 0 where each input's group is looked up."""
    indexed = block_k == 0
    block_k = block_k or BLOCK_K
    if dtype == torch.float32:
        # Multiplied without tensor cores, whole operands in registers.
        block_m, block_n, num_warps = SMALLEST_DOT, FLOAT32_COLUMNS, 4
        block_k = min(block_k, 32)
    elif rows <= 64 or indexed:
        # Scales and zeros of all of a tile's weights would not fit beside a larger one.
        block_m, block_n, num_warps = min(max(_power(rows), SMALLEST_DOT), 64), 64, 4
    else:
        block_m, block_n, num_warps = 128, 128, 8
    tiles = -(-rows // block_m) * sum(-(-out // block_n) for out in outs)
    splits, per_split = _split(in_features, block_k, -(-GEMM_PROGRAMS * processors // tiles))
    # Tiles of 64 rows that look groups up take up to 229, and spill under any limit.
    limits = {16: FEWER_REGISTERS, 32: FEWER_REGISTERS, 64: None if indexed else MORE_REGISTERS}
    return Settings(
        block_m, block_n, block_k, GEMM_RANKS, splits, per_split, num_warps, num_stages=3, registers=limits.get(block_m)
    )


def shrink(rows: int, rank: int, in_features: int, dtype: torch.dtype, processors: int) -> Settings:
    """For `shrink.shrink_kernel`; ``rank`` of all modules together."""
    if rows == 1:
        block_m, block_r = 1, GEMV_RANKS
    elif dtype == torch.float32:
        block_m, block_r = SMALLEST_DOT, 16
    else:
        block_m, block_r = min(max(_power(rows), SMALLEST_DOT), 64), min(max(_power(rank), SMALLEST_DOT), 64)
    block_k = BLOCK_K if dtype != torch.float32 else 32
    tiles = -(-rows // block_m) * -(-rank // block_r)
    splits, per_split = _split(in_features, block_k, -(-GEMM_PROGRAMS * processors // tiles))
    return Settings(block_m, 0, block_k, block_r, splits, per_split, num_warps=4, num_stages=3)


def shrink_expand(rows: int, rank: int, in_features: int, dtype: torch.dtype, processors: int) -> Settings:
    """For `expand.shrink_expand_kernel`: as `shrink`, with tiles of outputs."""
    base = shrink(rows, rank, in_features, dtype, processors)
    block_n = 64 if dtype != torch.float32 else FLOAT32_COLUMNS
    return Settings(
        base.block_m, block_n, base.block_k, base.block_r, base.splits, base.per_split, base.num_warps, base.num_stages
    )


def _split(length: int, block: int, wanted: int) -> tuple[int, int]:
    """Parts of a length that are multiples of a block: how many, at most ``wanted`` and `MOST_SPLITS`, and their size.

    The last may be shorter, or empty.
    """
    steps = -(-length // block)
    parts = min(max(wanted, 1), MOST_SPLITS, steps)
    # The count is compiled in; powers of two keep the number of variants small.
    parts = 1 << (parts.bit_length() - 1)
    per_part = -(-steps // parts)
    return parts, per_part * block


def _power(value: int) -> int:
    return 1 << (value - 1).bit_length()
