"""Patterns of zeros in a weight matrix, and what they would take in a layout that leaves the zeros out.

n:m means that of every m neighbours along a row (weights of one output) at most n are not zero. GPUs multiply 2:4
faster when many rows are multiplied at once; at one row there is nothing to win. In the layout that they read
(cuSPARSELt, and `sparse-24` of older compressed-tensors) each group of 4 is stored as its 2 values and a number of
2 bits for the place of each:

    w₀ 0 0 w₃ | 0 w₅ w₆ 0      →      values w₀ w₃ w₅ w₆,  places 00 11 01 10

that is 9 bits a weight of 16 bits. Zeros without a pattern are left out by a bit for each weight that tells whether it
is there. No file is written in these layouts here: since llm-compressor 0.11 and vLLM 0.24 nothing reads them. A plain
matrix with zeros in it is what every host opens.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

# Patterns that a matrix is examined for, the strictest first.
KNOWN = ((2, 4), (4, 8))
FORM = '"2:4" (of every 4 neighbours 2 are kept), "4:8", or the share of zeros, "0.5" or "50%"'
# Matrices with fewer zeros than this share are not pruned: a value may be zero by chance, or by rounding.
LEAST_SHARE = 0.05


@dataclass(frozen=True)
class Pattern:
    """Which weights of a row are zero.

    Attributes:
        kept: n of n:m; 0 without a pattern.
        of: m of n:m; 0 without a pattern.
        share: of weights that are zero.
    """

    kept: int
    of: int
    share: float

    @classmethod
    def parse(cls, text: str, *, what: str = "pattern") -> Pattern:
        """Read a pattern in one of the forms of `FORM`.

        Args:
            text: as a user writes it.
            what: names it in a message.

        Raises:
            ValueError: for any other form, or a share that is not between 0 and 1.
        """
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if found:
            kept, of = int(found[1]), int(found[2])
            if 0 < kept < of:
                return cls(kept, of, 1 - kept / of)
        found = re.fullmatch(r"\s*(\d*\.?\d+)\s*(%?)\s*", text)
        if found:
            share = float(found[1]) / (100 if found[2] else 1)
            if 0 < share < 1:
                return cls(0, 0, share)
        raise ValueError(f"{what} must be {FORM}, got {text!r}.")

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}" if self.of else f"{self.share:.0%}"

    def check(self, in_features: int, name: str) -> None:
        """Refuse a row that cannot be cut into groups of m.

        Raises:
            ValueError: naming the module.
        """
        if self.of and in_features % self.of:
            raise ValueError(
                f"{name}: {in_features} inputs cannot be cut into groups of {self.of}, as the pattern {self} needs. "
                f"Prune a share of the weights instead ({self.share:.0%}), or leave the module out."
            )


@dataclass(frozen=True)
class Sparsity:
    """The zeros that a matrix has.

    Attributes:
        weights: of the matrix.
        zeros: how many are zero.
        pattern: the strictest of `KNOWN` that it keeps, "2:4" for instance; None where it keeps none.
    """

    weights: int
    zeros: int
    pattern: str | None

    @property
    def share(self) -> float:
        """Of zeros."""
        return self.zeros / self.weights

    @property
    def is_pruned(self) -> bool:
        """Whether there are more zeros than chance leaves."""
        return self.share >= LEAST_SHARE

    def nbytes(self, bits: int) -> int:
        """Bytes in a layout that leaves the zeros out: by places where there is a pattern, else by a bit a weight.

        Args:
            bits: of a value.
        """
        if self.pattern is None:
            return math.ceil(((self.weights - self.zeros) * bits + self.weights) / 8)
        kept, of = map(int, self.pattern.split(":"))
        return math.ceil(self.weights * kept / of * (bits + math.log2(of)) / 8)


def examine(weight: torch.Tensor) -> Sparsity:
    """Count zeros and find the pattern that they keep.

    Args:
        weight: out × in, any dtype.
    """
    zero = weight == 0
    zeros = int(zero.sum())
    for kept, of in KNOWN:
        if weight.shape[1] % of == 0 and zeros >= weight.numel() * (1 - kept / of):
            fewest = zero.view(weight.shape[0], -1, of).sum(2).min()
            if int(fewest) >= of - kept:
                return Sparsity(weight.numel(), zeros, f"{kept}:{of}")
    return Sparsity(weight.numel(), zeros, None)
