"""What each rank will buy in a module, told before it is quantised from its weights rounded to nearest."""

from __future__ import annotations

import torch

from ..ranks import RankOptions
from ..solve import Curve, component_gains, diagonal, eora, error_loss, rank_curve
from .sensitivity import Sensitivity

# Shares of a group's largest value that are tried as the end of its grid. Few bits clip much.
CLIPPING = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Ŵ by rounding each group to a symmetric grid, its scale chosen for the least squared error.

    It stands for what a better quantiser will do: the errors of GPTQ are smaller, but the modules' shares of the loss
    and the shapes of the spectra are alike enough to plan by.

    Args:
        weight: out × in.
        bits: of a code.
        group_size: weights per scale along a row; -1 for the whole row. A last shorter group is allowed.

    Returns:
        out × in, float32.
    """
    out_features, in_features = weight.shape
    size = in_features if group_size == -1 else group_size
    padding = -in_features % size
    grouped = torch.nn.functional.pad(weight.to(torch.float32), (0, padding)).view(out_features, -1, size)
    lowest = -(1 << (bits - 1))
    largest = grouped.abs().amax(2, keepdim=True)
    best, least = torch.zeros_like(grouped), torch.full_like(largest, torch.inf)
    for clipping in CLIPPING:
        step = largest * (clipping / -lowest)
        rounded = torch.where(step > 0, grouped / step, 0).round_().clamp_(lowest, -lowest - 1) * step
        error = (rounded - grouped).square().sum(2, keepdim=True)
        best = torch.where(error < least, rounded, best)
        least = torch.minimum(error, least)
    return best.flatten(1)[:, :in_features]


def forecast(name: str, delta: torch.Tensor, sensitivity: Sensitivity, options: RankOptions) -> Curve:
    """The curve of a module: predicted loss against bytes for the ranks on offer.

    Args:
        name: full module name.
        delta: the weights' error, out × in, float32: known, or of `round_to_nearest`.
        sensitivity: of the model.
        options: ranks on offer.
    """
    total, gains = forecast_gains(name, delta, sensitivity, options.ranks[-1])
    return rank_curve(gains, total, options.ranks, options.nbytes)


def forecast_gains(name: str, delta: torch.Tensor, sensitivity: Sensitivity, rank: int) -> tuple[float, torch.Tensor]:
    """Predicted loss of a module without an adapter, and what each of ``rank`` components takes off, largest first.

    Args:
        name: full module name.
        delta: ΔW, out × in, float32.
        sensitivity: of the model.
        rank: 0 for no components.
    """
    if name not in sensitivity.output_moments:
        # No calibration token reached it: nothing is known to be lost.
        return 0.0, delta.new_zeros(rank, dtype=torch.float64)
    second_moment = sensitivity.second_moments[name].to(delta.device)
    output_moment = sensitivity.output_moments[name].to(delta.device)
    total = error_loss(delta, second_moment, output_moment)
    if rank == 0:
        return total, delta.new_zeros(0, dtype=torch.float64)
    solver = diagonal if second_moment.ndim == 1 else eora
    lora_A, lora_B = solver(delta, second_moment, rank)
    return total, component_gains(lora_A, lora_B, second_moment, output_moment).sort(descending=True).values
