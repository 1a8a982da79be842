"""Random packed weights and factors."""

from __future__ import annotations

import torch

from gptqmodel_eora_ext.formats.factors import Factors
from gptqmodel_eora_ext.formats.packed_weights import PackedWeight, pack_words
from gptqmodel_eora_ext.solve.quantized import quantize_factor


def packed_weight(
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    *,
    sym: bool = True,
    desc_act: bool = False,
    version_1: bool = False,
    seed: int = 0,
) -> PackedWeight:
    """A weight of random codes with scales like a trained model's, Ŵ ≈ N(0, 1 / in)."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    codes = torch.randint(0, 1 << bits, (in_features, out_features), generator=generator)
    scales = (torch.rand(groups, out_features, generator=generator) + 0.5) * in_features**-0.5 / (1 << (bits - 1))
    lowest = 1 if version_1 else 0
    zeros = torch.randint(lowest, 1 << bits, (groups, out_features), generator=generator)
    if sym:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    g_idx = torch.arange(in_features, dtype=torch.int32) // (in_features if group_size == -1 else group_size)
    if desc_act:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    return PackedWeight(
        qweight=pack_words(codes, bits),
        qzeros=pack_words((zeros - int(version_1)).T, bits).T.contiguous(),
        scales=scales.to(torch.float16),
        g_idx=g_idx,
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        out_features=out_features,
        stores_zero_minus_one=version_1,
    )


def random_factors(weight: PackedWeight, rank: int, factor_bits: int = 16, *, seed: int = 1) -> Factors:
    """Factors whose correction is about as large as the weight's rounding."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, weight.in_features, generator=generator) * weight.in_features**-0.5
    up = torch.randn(rank, weight.out_features, generator=generator) * rank**-0.5
    if factor_bits == 16:
        return Factors(down.to(torch.float16), up.to(torch.float16))
    return Factors(quantize_factor(down, factor_bits), quantize_factor(up, factor_bits))


def random_input(rows: int, in_features: int, dtype: torch.dtype = torch.float32, *, seed: int = 2) -> torch.Tensor:
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
