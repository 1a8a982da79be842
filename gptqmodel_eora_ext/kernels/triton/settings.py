"""How each launch is cut into tiles. Pure functions of the shape, so that every setting can be compiled beforehand.

What is called measured was measured on one H100 at 2 to 4 bits, rank 64, 4096 and 12288 features. Registers and shared
memory are checked for all targets by tests/kernels/test_triton_compile.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ...formats.packed_weights import WORD_BITS

# Programs wanted per multiprocessor: a memory-bound program alone cannot keep enough reads in flight.
GEMV_PROGRAMS = 8
GEMM_PROGRAMS = 2
# 64 outputs: a row of words is read in two full 128-byte lines. 16 rows: a thread takes eight outputs of a unit, to
# which each value of x that it loads is common.
GEMV_COLUMNS = 64
GEMV_UNITS = 16
# Where each weight has its own scale and zero, a thread with eight outputs runs out of registers, so it takes fewer.
GEMV_INDEXED_UNITS = 8
# Most registers of a thread, which NVIDIA's assembler is told where it would otherwise spill a few bytes to memory so
# that more programs run at once. Programs have 128 threads. With 128 registers to a thread four of them fit on a
# multiprocessor, which tiles of 16 and 32 rows can do with. With 168 registers three fit: the GEMV at 3 bits and tiles
# of 64 rows need so many. 255 is all that a thread can have: the GEMV at 3 bits that looks groups up, x Aᵀ of 64 rows,
# and the correction in float32 need them.
FEWER_REGISTERS = 128
MORE_REGISTERS = 168
ALL_REGISTERS = 255
# Rank components per step without tensor cores.
GEMV_RANKS = 16
# Rank components per step on tensor cores: with 32, some tiles of 64 rows spill.
GEMM_RANKS = 16
# Parts that the inputs are cut into at most. Measured: 8 and 32 parts are slower. One row times A is the exception,
# since it has few tiles and its sums are cheap: it takes up to 32.
MOST_SPLITS = 16
MOST_ROW_SPLITS = 32
# Inputs of one step of a tensor-core tile.
BLOCK_K = 64
SMALLEST_DOT = 16
# Measured: 4 warps and 1 are slower.
GEMV_WARPS = 2
# Rank components and inputs of a step of x Aᵀ. Measured: with 32 components there are too few programs to fill the
# device, and 64 inputs are slower.
SHRINK_RANKS = 16
SHRINK_INPUTS = 128
# Beyond these rows Ŵ made dense and the vendor's product are faster (measured at 64: slower; at 512: twice as fast).
MOST_FUSED_ROWS = 64
# Rows for which the compiled kernel for many rows is taken on Hopper.
COMPILED_ROWS = range(17, 4097)
# Beyond these rows and ranks (of one row, of more), two products of the vendor's library add an adapter faster than
# one launch does.
MOST_CORRECTION_ROWS = 16
MOST_CORRECTION_RANKS = (128, 64)
# Fewest and most outputs of a tile. One program runs on each multiprocessor; the width is chosen so that each has one
# tile, as far as these bounds allow.
CORRECTION_COLUMNS = (32, 128)
CORRECTION_RANKS = 64
CORRECTION_INPUTS = 256
# Parts that x Aᵀ is cut into, for one row and for more. Each program reads all of them. Measured: twice as many take
# longer.
ROW_CORRECTION_SPLITS = 16
CORRECTION_SPLITS = 8
FACTOR_COLUMNS = 1024
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


@lru_cache(maxsize=1024)
def gemv(outs: tuple[int, ...], in_features: int, bits: int, indexed: bool, processors: int) -> Settings:
    """For `gemv.gemv_kernel`, one row; ``indexed`` where each input's group is looked up."""
    tiles = sum(-(-out // GEMV_COLUMNS) for out in outs)
    units = GEMV_INDEXED_UNITS if indexed else GEMV_UNITS
    splits, per_split = _split(-(-in_features // unit_codes(bits)), units, -(-GEMV_PROGRAMS * processors // tiles))
    limit = (ALL_REGISTERS if indexed else MORE_REGISTERS) if bits == 3 else None
    return Settings(
        1, GEMV_COLUMNS, units, GEMV_RANKS, splits, per_split, num_warps=GEMV_WARPS, num_stages=2, registers=limit
    )


@lru_cache(maxsize=1024)
def gemm(
    rows: int, outs: tuple[int, ...], in_features: int, block_k: int, dtype: torch.dtype, processors: int
) -> Settings:
    """For `gemm.gemm_kernel`, up to `MOST_FUSED_ROWS`; ``block_k`` from `tile_inputs`, 0 where groups are looked up."""
    indexed = block_k == 0
    block_k = block_k or BLOCK_K
    if dtype == torch.float32:
        # Multiplied without tensor cores, whole operands in registers.
        block_m, block_n = SMALLEST_DOT, FLOAT32_COLUMNS
        block_k = min(block_k, 32)
    else:
        block_m, block_n = _row_tile(rows), 64
    tiles = -(-rows // block_m) * sum(-(-out // block_n) for out in outs)
    splits, per_split = _split(in_features, block_k, -(-GEMM_PROGRAMS * processors // tiles))
    # Tiles of 64 rows that look groups up take up to 229, and spill under any limit.
    limits = {16: FEWER_REGISTERS, 32: FEWER_REGISTERS, 64: None if indexed else MORE_REGISTERS}
    return Settings(
        block_m,
        block_n,
        block_k,
        GEMM_RANKS,
        splits,
        per_split,
        num_warps=4,
        num_stages=3,
        registers=limits.get(block_m),
    )


@lru_cache(maxsize=1024)
def shrink(rows: int, rank: int, in_features: int, dtype: torch.dtype, processors: int) -> Settings:
    """For `shrink.shrink_kernel`; ``rank`` of all modules together."""
    block_m, block_k, most = _row_tile(rows), SHRINK_INPUTS, MOST_SPLITS
    if rows == 1:
        block_m, most = 1, MOST_ROW_SPLITS
    elif dtype == torch.float32:
        block_m, block_k = SMALLEST_DOT, 32
    elif block_m == 64:
        # More would not fit AMD's shared memory.
        block_k = 64
    tiles = -(-rows // block_m) * -(-rank // SHRINK_RANKS)
    splits, per_split = _split(in_features, block_k, -(-GEMM_PROGRAMS * processors // tiles), most)
    limit = ALL_REGISTERS if block_m == 64 else None
    return Settings(block_m, 0, block_k, SHRINK_RANKS, splits, per_split, num_warps=4, num_stages=3, registers=limit)


def most_correction_rank(rows: int) -> int:
    """Up to which `correction.correction_kernel` adds an adapter of up to `MOST_CORRECTION_ROWS`."""
    return MOST_CORRECTION_RANKS[rows > 1]


def programs(processors: int) -> int:
    """For `correction.correction_kernel`: the power of two that runs at once on so many multiprocessors."""
    return 1 << (processors.bit_length() - 1)


@lru_cache(maxsize=1024)
def correction(rows: int, rank: int, in_features: int, columns: int, dtype: torch.dtype, programs: int) -> Settings:
    """For `correction.correction_kernel`, up to `MOST_CORRECTION_ROWS`."""
    if rows == 1:
        block_m, block_k, most, stages = 1, CORRECTION_INPUTS, ROW_CORRECTION_SPLITS, 2
    else:
        block_m, block_k, most, stages = SMALLEST_DOT, CORRECTION_INPUTS, CORRECTION_SPLITS, 4
        if dtype == torch.float32:
            block_k = 32
    narrow, wide = CORRECTION_COLUMNS
    most_columns = FLOAT32_COLUMNS if dtype == torch.float32 else wide
    block_n = min(max(1 << (-(-columns // programs) - 1).bit_length(), narrow), most_columns)
    splits, per_split = _split(in_features, block_k, most, most)
    limit = ALL_REGISTERS if dtype == torch.float32 else None
    return Settings(
        block_m, block_n, block_k, SHRINK_RANKS, splits, per_split, num_warps=4, num_stages=stages, registers=limit
    )


def dequantize(block_k: int) -> Settings:
    """For `dense.dequantize_kernel`; ``block_k`` from `tile_inputs`, 0 where each input's group is looked up."""
    return Settings(1, 64, block_k or BLOCK_K, 1, 1, 0, num_warps=4, num_stages=1)


def _split(length: int, block: int, wanted: int, most: int = MOST_SPLITS) -> tuple[int, int]:
    """Parts of a length that are multiples of a block: how many, at most ``wanted`` and ``most``, and their size.

    The last may be shorter, or empty.
    """
    steps = -(-length // block)
    parts = min(max(wanted, 1), most, steps)
    # The count is compiled in; powers of two keep the number of variants small.
    parts = 1 << (parts.bit_length() - 1)
    per_part = -(-steps // parts)
    return parts, per_part * block


def _row_tile(rows: int) -> int:
    """The power of two that holds the rows, within what tensor cores and registers take."""
    return min(max(1 << (rows - 1).bit_length(), SMALLEST_DOT), 64)
