"""The factors of one module, and what they bought."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..formats.factors import QuantizedFactor, to_dense


@dataclass(frozen=True)
class ModuleFactors:
    """The factors of one module and what they bought.

    Attributes:
        lora_A: rank × in_features, as it is applied.
        lora_B: out_features × rank.
        requested_rank: what was asked; ``rank`` is lower where the shape or the tokens did not allow it.
        tokens: tokens that the second moment stands on.
        signal: E‖W x‖², mean squared norm of the module's output.
        error_before: E‖ΔW x‖² without the adapter.
        error_after: E‖(ΔW − B A) x‖² with the stored factors; None where they were trained afterwards, by what the
            whole model loses: the error of a module by itself is not known then, and no measure of them.
        packed: A and Bᵀ in integers, where they are stored so (B, where its layout runs along the rank);
            ``lora_A`` and ``lora_B`` are their values.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    requested_rank: int
    tokens: int
    signal: float
    error_before: float
    error_after: float | None
    packed: tuple[QuantizedFactor, QuantizedFactor] | None = None

    @classmethod
    def of_unknown_error(
        cls, lora_A: torch.Tensor | QuantizedFactor, up: torch.Tensor | QuantizedFactor
    ) -> ModuleFactors:
        """Factors as adapters are saved from, of which the module's own error is not known.

        Args:
            lora_A: rank × in_features, packed or not.
            up: Bᵀ, rank × out_features, likewise.
        """
        packed = (lora_A, up) if isinstance(lora_A, QuantizedFactor) and isinstance(up, QuantizedFactor) else None
        dtype = torch.float32 if packed else lora_A.dtype  # type: ignore[union-attr]
        down, dense = to_dense(lora_A, dtype), to_dense(up, dtype).T.contiguous()
        return cls(down, dense, len(down), tokens=0, signal=0.0, error_before=0.0, error_after=None, packed=packed)

    @property
    def rank(self) -> int:
        """Rank that is stored; 0 for factors of no effect."""
        return self.lora_A.shape[0]

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors as stored, scales included."""
        return sum(factor.nbytes for factor in self.packed or (self.lora_A, self.lora_B))

    def to(self, device: torch.device | str) -> ModuleFactors:
        """The same factors on ``device``."""
        packed = (self.packed[0].to(device), self.packed[1].to(device)) if self.packed else None
        return replace(self, lora_A=self.lora_A.to(device), lora_B=self.lora_B.to(device), packed=packed)

    def report(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "rank": self.rank,
            "requested_rank": self.requested_rank,
            "tokens": self.tokens,
            "bytes": self.nbytes,
            "signal": self.signal,
            "error_before": self.error_before,
            "error_after": self.error_after,
        }
