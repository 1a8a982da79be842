"""Adam over all factors at once (Kingma and Ba, arXiv 1412.6980), some groups at a time: temporaries are small."""

from __future__ import annotations

import math

import torch

from .factors import CHUNK_GROUPS, TrainedFactors
from .settings import LAST_RATE

BETAS = (0.9, 0.999)
# Beside the root of the second moment: gradients of SmolLM2's factors are 1e-6 to 1e-3.
EPSILON = 1e-8


class Adam:
    """Steps the master copy of factors by their gradient.

    Args:
        factors: what is stepped.

    Attributes:
        first: running mean of the gradient, groups × 64, float32.
        second: running mean of its square.
        steps: taken so far.
    """

    def __init__(self, factors: TrainedFactors) -> None:
        self._factors = factors
        self.first = torch.zeros_like(factors.master)
        self.second = torch.zeros_like(factors.master)
        self.steps = 0

    def step(self, rate: float) -> None:
        """Take a step at a learning rate, and set the gradient to zero."""
        self.steps += 1
        unbiased = [1 - beta**self.steps for beta in BETAS]
        for begin in range(0, len(self._factors), CHUNK_GROUPS):
            part = slice(begin, begin + CHUNK_GROUPS)
            gradient = self._factors.gradient[part].to(torch.float32)
            first, second = self.first[part], self.second[part]
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            spread = (second / unbiased[1]).sqrt_().add_(EPSILON)
            self._factors.master[part].addcdiv_(first, spread, value=-rate / unbiased[0])
        self._factors.gradient.zero_()


def cosine_rate(rate: float, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0: from ``rate`` down to `LAST_RATE` of it, by half a cosine."""
    share = step / max(steps - 1, 1)
    return rate * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * share)) / 2)
