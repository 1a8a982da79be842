"""The second moment of a module's output error, for weights whose error is known before the data is seen.

With z = ΔW x, S = E[z zᵀ] = ΔW C ΔWᵀ is all that EoRA needs: out × out instead of in × in, which for a module that
narrows (`down_proj`, the key and value projections of grouped attention) is the smaller and cheaper sum.
"""

from __future__ import annotations

import torch

from ..solve import multiplies_bfloat16
from .second_moment import DiagonalMoment, SecondMoment, kept_rows

SIGNAL_STRIDE = 16
# A token whose ‖x‖² is more than this many times the median is always multiplied in float32.
LARGE_TOKEN = 16


class OutputErrorMoment:
    """Sums of z zᵀ, of x² per channel, and of ‖W x‖².

    Args:
        weight: W, out × in.
        quantized: Ŵ, out × in.
        name: the module, for messages.
    """

    def __init__(self, weight: torch.Tensor, quantized: torch.Tensor, name: str) -> None:
        # A checkpoint's kernel may be on another device than the weight.
        self.delta = weight.to(torch.float32) - quantized.to(device=weight.device, dtype=torch.float32)
        self._narrow_delta: torch.Tensor | None = None
        self.name = name
        self._errors = SecondMoment(weight.shape[0], name)
        self._energies = DiagonalMoment(weight.shape[1], name)
        self.weight = weight
        self._signal = 0.0
        self._signal_tokens = 0

    @staticmethod
    def is_cheaper(out_features: int, in_features: int) -> bool:
        """Whether z and z zᵀ take fewer operations a token than x xᵀ, of which half is computed."""
        return out_features * in_features + out_features**2 // 2 < in_features**2 // 2

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self._errors.tokens

    def add(self, inputs: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Add a batch: see `SecondMoment.add`."""
        rows = kept_rows(inputs, keep, self.delta.shape[1], self.name)
        self._errors.add(self._errors_of(rows, inputs.dtype))
        self._energies.add(rows)
        some = rows[::SIGNAL_STRIDE]
        self._signal += float((some @ self.weight.to(some).T).square().sum())
        self._signal_tokens += len(some)

    def _errors_of(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """ΔW x of each row, tokens × out.

        Inputs of bfloat16 (``dtype``) are multiplied as such where that is faster. ΔW and z are rounded then, each
        entry on its own, which adds some 1e-6 of its trace to S: B only needs the directions of S, and A is solved
        against the ΔW that is not rounded. A few large tokens may be nearly all of that trace, and little of what is
        left once they are corrected; they are not rounded.
        """
        if len(rows) == 0 or dtype != torch.bfloat16 or not multiplies_bfloat16(rows.device):
            return rows @ self.delta.to(rows.device).T
        if self._narrow_delta is None or self._narrow_delta.device != rows.device:
            self._narrow_delta = self.delta.to(device=rows.device, dtype=dtype)
        errors = (rows.to(dtype) @ self._narrow_delta.T).to(torch.float32)
        energies = torch.linalg.vecdot(rows, rows)
        large = energies > LARGE_TOKEN * energies.median()
        errors[large] = rows[large] @ self.delta.to(rows.device).T
        return errors

    def mean(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return S = Σ z zᵀ / tokens, out × out, float32, on ``device``."""
        return self._errors.mean(device)

    def energies(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """E[x²] per channel, of length in, float32: the diagonal of C."""
        return self._energies.mean(device)

    @property
    def signal(self) -> float:
        """E‖W x‖², estimated on one token of `SIGNAL_STRIDE`: it only tells what the error stands beside."""
        return self._signal / max(self._signal_tokens, 1)

    def require_finite(self) -> None:
        """Raise ValueError when an input held NaN or infinity."""
        self._energies.require_finite()
