"""How far a model's predictions are from the full-precision model's, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..system.spill import Kept, Spill
from .perplexity import ROWS

# Windows of a text that the divergence is taken on. Of each, all logits of the full-precision model are kept: 0.8 GB
# for SmolLM2 with 512 tokens in a window, 2.5 GB for a vocabulary of 150,000.
DIVERGENCE_WINDOWS = 16


@dataclass
class Reference:
    """What the full-precision model predicts on a text, kept for comparing.

    The most likely token is kept of every window; all logits, in the model's own dtype, of the first ``most``.

    Attributes:
        spill: keeps the logits, in memory or on disk.
        most: windows that logits are kept of.
    """

    spill: Spill
    most: int = DIVERGENCE_WINDOWS
    _likeliest: list[torch.Tensor] = field(default_factory=list)
    _logits: list[Kept] = field(default_factory=list)

    def keep(self, logits: torch.Tensor) -> None:
        """Take the next window's logits (tokens × vocabulary).

        Raises:
            OSError: when the disk is full.
        """
        self._likeliest.append(logits.argmax(-1).to("cpu", torch.int32))
        if len(self._logits) < self.most:
            self._logits.append(self.spill.keep(logits))

    def compare(self, window: int, logits: torch.Tensor) -> dict[str, Any]:
        """Another model's logits on a window (tokens × vocabulary) beside those that were kept.

        Returns:
            `same`: tokens that both models find the likeliest; `kl`: Σ over tokens of KL(full precision ‖ this model)
            in nats, None beyond the windows that logits are kept of.

        Raises:
            ValueError: when the two have vocabularies of different sizes.
        """
        same = int((logits.argmax(-1).to("cpu", torch.int32) == self._likeliest[window]).sum())
        if window >= len(self._logits):
            return {"same": same, "kl": None}
        full = self.spill.read(self._logits[window], logits.device)
        if full.shape != logits.shape:
            raise ValueError(
                f"the full-precision model tells {full.shape[-1]} tokens apart, this one {logits.shape[-1]}: they are "
                f"no model and its quantised copy. Name the base that it was quantised from by --base."
            )
        return {"same": same, "kl": summed_divergence(full, logits)}


def summed_divergence(full: torch.Tensor, other: torch.Tensor) -> float:
    """Σ over rows of KL(p ‖ q) = Σ p (log p − log q), in nats: p and q of logits (tokens × vocabulary), in float32."""
    total = 0.0
    with torch.inference_mode():
        for some, others in zip(full.split(ROWS), other.split(ROWS), strict=True):
            log_p, log_q = (torch.log_softmax(one.to(torch.float32), -1) for one in (some, others))
            total += float(torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return total
