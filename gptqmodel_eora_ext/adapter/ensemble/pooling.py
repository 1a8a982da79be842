"""What a router knows of text: averages over tokens of what early layers compute, for a prompt and for calibration."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Tokens of the pieces that a window's sums are kept of.
PIECE = 16
# The first token of a prompt carries no text in many models, but a value thousands of times those of others.
SKIPPED = 1


def pooled(seen: Sequence[torch.Tensor], mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of each prompt's tokens, the first left out, and how many tokens each has.

    Args:
        seen: of each early layer what is read of it, prompts × tokens × features, any floating dtype.
        mask: prompts × tokens, non-zero for real tokens, wherever padding stands; None for all.

    Returns:
        prompts × features of all layers, float32; and counts of all real tokens, int64.
    """
    shape, device = seen[0].shape[:2], seen[0].device
    counted = torch.ones(shape, device=device) if mask is None else (mask != 0).to(device).float()
    tokens = counted.sum(dim=1).long()
    counted = counted * (counted.cumsum(dim=1) > SKIPPED)
    sums = torch.cat([torch.einsum("pt,ptf->pf", counted * _sizes(one), one.float()) for one in seen], dim=1)
    return sums / counted.sum(dim=1, keepdim=True).clamp_min(1), tokens


def summed(seen: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sums over each `PIECE` tokens of windows, the first token of a window left out: what `Router.fit` takes.

    Args:
        seen: as `pooled` takes it, of windows without padding.

    Returns:
        windows × pieces × features of all layers, float32; tokens after the last whole piece are left out.
    """
    found = []
    for one in seen:
        count = one.shape[1] // PIECE
        sizes = _sizes(one)
        sizes[:, :SKIPPED] = 0
        cut = (one.float() * sizes[:, :, None])[:, : count * PIECE]
        found.append(cut.unflatten(1, (count, PIECE)).sum(dim=2))
    return torch.cat(found, dim=2)


def _sizes(one: torch.Tensor) -> torch.Tensor:
    """1 over the root mean square of each token, prompts × tokens, float32."""
    tiny = torch.finfo(torch.float32).tiny
    return one.float().square().mean(dim=-1).clamp_min(tiny).rsqrt()
