"""What is done to factors before they are stored: balance, then rounding."""

from __future__ import annotations

import torch


def balance(lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale each component so that its row of A and its column of B have the same norm; B A is unchanged.

    EoRA's B is orthonormal while A carries all magnitude; balanced, both halves keep their digits in float16.

    Args:
        lora_A: rank × in.
        lora_B: out × rank.
    """
    norm_a = lora_A.norm(dim=1)
    norm_b = lora_B.norm(dim=0)
    live = (norm_a > 0) & (norm_b > 0)
    scale = torch.where(live, (norm_b / norm_a.clamp_min(torch.finfo(norm_a.dtype).tiny)).sqrt(), norm_a.new_ones(()))
    return lora_A * scale[:, None], lora_B / scale[None, :]


def round_to(lora_A: torch.Tensor, lora_B: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return contiguous copies in ``dtype``.

    Raises:
        ValueError: when a value does not fit the dtype (float16 ends at 65504).
    """
    limit = torch.finfo(dtype).max
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        largest = float(factor.abs().max()) if factor.numel() else 0.0
        if largest > limit:
            raise ValueError(f"{name} reaches {largest:.3g}, above the largest {dtype} ({limit:.3g}).")
    return lora_A.to(dtype).contiguous(), lora_B.to(dtype).contiguous()
