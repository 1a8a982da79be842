"""Second moments of few rows, kept as the rows: products with XᵀX / n that never form it.

A moment of n rows has at most rank n. Where n is below the number of features, X takes less memory than XᵀX, and a
product with it fewer operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch

# Rows of a matrix that are widened at a time. A float64 copy of a whole 27648-wide moment would take 6 GB;
# a chunk of 4096 rows takes 0.9 GB and costs nothing measurable in speed.
CHUNK_ROWS = 4096


@dataclass(frozen=True)
class RowMoment:
    """XᵀX / count of the rows X.

    Attributes:
        rows: X, n × features, any floating dtype.
        count: what the sum is divided by: n for a mean over the rows.
    """

    rows: torch.Tensor
    count: float

    @property
    def ndim(self) -> int:
        """2: it stands for a matrix."""
        return 2

    @property
    def shape(self) -> torch.Size:
        """(features, features)."""
        return torch.Size((self.rows.shape[1], self.rows.shape[1]))

    def weigh(self, vectors: torch.Tensor) -> torch.Tensor:
        """Y XᵀX / count for Y of k × features, in Y's dtype."""
        return times(times(vectors, self.rows.T), self.rows) / self.count

    def image(self, columns: torch.Tensor) -> torch.Tensor:
        """X M / √count for M of features × k, n × k, in M's dtype: its Gram matrix is Mᵀ (XᵀX / count) M."""
        return times(self.rows.to(columns.dtype), columns) / math.sqrt(self.count)

    def diagonal(self) -> torch.Tensor:
        """Mean square of each feature, float32."""
        return self.rows.to(torch.float32).square().sum(0) / self.count

    def dense(self) -> torch.Tensor:
        """The matrix, features × features, float32."""
        rows = self.rows.to(torch.float32)
        return (rows.T @ rows).div_(self.count)

    def root(self) -> torch.Tensor:
        """Xᵀ / √count, features × n, float64."""
        return self.rows.T.to(torch.float64) / math.sqrt(self.count)

    def to(self, device: torch.device | str) -> RowMoment:
        """The same on another device."""
        return RowMoment(self.rows.to(device), self.count)


# Features × features, or its diagonal, or the rows that it is of.
Moment: TypeAlias = torch.Tensor | RowMoment


def diagonal_of(moment: Moment) -> torch.Tensor:
    """The diagonal of a moment in any form."""
    return moment.diagonal() if moment.ndim == 2 else moment  # type: ignore[return-value]


def times(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``rows @ matrix`` in the dtype of ``rows``, widening the matrix a chunk of its rows at a time.

    A thin block from the left is the faster way round on a CPU, by a sixth.
    """
    if matrix.dtype == rows.dtype:
        return rows @ matrix
    product = rows.new_zeros(rows.shape[0], matrix.shape[1])
    for start in range(0, matrix.shape[0], CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        product.addmm_(rows[:, chunk], matrix[chunk].to(rows.dtype))
    return product
