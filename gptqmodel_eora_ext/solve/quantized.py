"""Factors in 8 or 4 bits: how their integers and scales are chosen."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..formats.factors import GROUP_SIZE, PACKED_LAYOUT, FactorLayout, QuantizedFactor, pack
from .error import WeightedError
from .factors import NormalEquations, refit_A

# Clipping thresholds tried per group, as shares of its largest value. At 8 bits rounding is negligible.
CLIPPING = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}
# Times that A is rounded: each round re-solves A against the last rounded B. On SmolLM2 four rounds
# take 0.2 to 4 % off the error that one leaves (docs/method.md); two were not measured apart.
ROUNDS = 2


def quantize_factor(
    values: torch.Tensor, bits: int, importance: torch.Tensor | None = None, group_size: int = GROUP_SIZE
) -> QuantizedFactor:
    """Round to the grid, each group with the scale that gives the least squared error.

    Args:
        values: rows × features.
        bits: 8 or 4.
        importance: weight of each feature's squared error, of length features; None for all alike.
        group_size: values of a row that share a scale.

    Raises:
        ValueError: when a scale does not fit float16.
    """
    rows, features = values.shape
    groups = -(-features // group_size)
    padding = groups * group_size - features
    grouped = torch.nn.functional.pad(values.to(torch.float32), (0, padding)).view(rows, groups, group_size)
    weights = torch.ones(features, device=values.device) if importance is None else importance.to(torch.float32)
    weights = torch.nn.functional.pad(weights, (0, padding)).view(groups, group_size)
    lowest = -(1 << (bits - 1))
    # The value of largest size, with its sign, lies on the lowest code, so that no code of the grid is wasted.
    extreme = grouped.gather(2, grouped.abs().argmax(2, keepdim=True)).squeeze(2)
    if float(extreme.abs().max()) / -lowest > torch.finfo(torch.float16).max:
        raise ValueError(f"a factor reaches {float(extreme.abs().max()):.3g}, too large for float16 scales.")
    best = torch.full_like(extreme, torch.inf)
    scales = torch.zeros_like(extreme, dtype=torch.float16)
    integers = torch.zeros_like(grouped)
    for clipping in CLIPPING[bits]:
        candidate = (extreme * (clipping / lowest)).to(torch.float16)
        step = candidate.to(torch.float32)[:, :, None]
        rounded = torch.where(step != 0, grouped / step, 0).round_().clamp_(lowest, -lowest - 1)
        error = ((rounded * step - grouped).square() * weights).sum(2)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, candidate, scales)
        integers = torch.where(better[:, :, None], rounded, integers)
    flat = integers.view(rows, groups * group_size)[:, :features].to(torch.int8)
    return QuantizedFactor(pack(flat, bits), scales, bits, features, group_size)


def quantize_factors(
    target: torch.Tensor,
    second_moment: torch.Tensor | None,
    lora_A: torch.Tensor,
    bits: int,
    layout: FactorLayout = PACKED_LAYOUT,
) -> tuple[QuantizedFactor, QuantizedFactor]:
    """Round A, re-solve B against the rounded A under C, round B; then again with A re-solved against the rounded B.

    Args:
        target: what B A approximates, out × in: ΔW, or the target of `output`.
        second_moment: C that the error is weighed by: in × in, its diagonal, or None for the identity.
        lora_A: rank × in, scaled as it is to be stored (`balance`).
        bits: 8 or 4.
        layout: of the file that they are for. The rank is a multiple of `FactorLayout.multiple`.

    Returns:
        A (rank × in) and Bᵀ (rank × out), the best pair of all rounds; B (out × rank) where groups run along the rank.
    """
    candidates = _rounds(WeightedError(target, second_moment), lora_A, bits, layout)
    packed_A, packed_B, _ = min(candidates, key=lambda candidate: candidate[2])
    return packed_A, packed_B


def stored_B(packed_B: QuantizedFactor, layout: FactorLayout, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """B's values, out × rank, from the second of `quantize_factors`."""
    values = packed_B.dequantize(dtype)
    return values if layout.along_rank else values.T.contiguous()


def _rounds(
    error: WeightedError, lora_A: torch.Tensor, bits: int, layout: FactorLayout
) -> Iterator[tuple[QuantizedFactor, QuantizedFactor, float]]:
    """Pairs, and ‖(ΔW − B A) C^½‖² − ‖ΔW C^½‖² of each: what it leaves, apart from what all pairs share."""
    importance = error.channel_energies()
    for left in reversed(range(ROUNDS)):
        packed_A = quantize_factor(lora_A, bits, importance, layout.group_size)
        normal = NormalEquations(error, packed_A.dequantize(torch.float64))
        lora_B = normal.solution()
        if layout.along_rank:
            # Components share a scale, and an error in the first of them costs the most: its weight is A C Aᵀ there.
            packed_B = quantize_factor(lora_B, bits, normal.gram.diagonal(), layout.group_size)
        else:
            packed_B = quantize_factor(lora_B.T, bits, group_size=layout.group_size)
        yield packed_A, packed_B, normal.relative_energy(stored_B(packed_B, layout, torch.float64))
        if left:
            lora_A = refit_A(error.delta, stored_B(packed_B, layout))
