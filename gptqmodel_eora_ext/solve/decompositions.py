"""Decompositions of matrices whose bits do not depend on the number of threads, on a CPU.

MKL's LAPACK cuts its work by the number of threads, so that its last bits differ between one and two. Products of
matrices keep theirs with one thread and two, where sides are multiples of 64, as those of models are (held by
`tests/solve/test_decompositions.py`). GPTQ turns a last bit into other codes, and a run that is shared between
processes, or resumed with other threads, should end with the same ones. So LAPACK is called on one thread, where more
win little: on some hundred rows. Triangular factors of large matrices are made of products, which take all threads.
Eigenvectors of large ones take one thread as well, but are only what the solvers fall back to. On a GPU threads decide
nothing, and Cholesky's factor is torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# A triangular factor of at most this side is made, and inverted, by LAPACK; a larger one by halves. Twice and half as
# much took as long.
LEAF = 128


class NotDefinite(ArithmeticError):
    """A matrix has no Cholesky factor, as far as rounding can tell."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes on one thread; other threads of Python, which have their own setting, go on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def upper_root(matrix: torch.Tensor) -> torch.Tensor:
    """U, upper triangular, with U Uᵀ = A: Cholesky's factor, read backwards.

    GPTQ wants it so: U⁻¹ is the upper Cholesky factor of A⁻¹, found without inverting A.

    Args:
        matrix: A, n × n, symmetric and positive definite, float32 or float64. About two more of it are in memory.

    Raises:
        NotDefinite: where A is not positive definite.
    """
    size, half = len(matrix), len(matrix) // 2
    if size <= LEAF or matrix.device.type != "cpu":
        with one_thread():
            lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if failed:
            raise NotDefinite(f"a matrix of {size} × {size} is not positive definite")
        return lower.flip(0, 1)
    root = torch.zeros_like(matrix)
    root[half:, half:] = last = upper_root(matrix[half:, half:])
    root[:half, half:] = beside = matrix[:half, half:] @ invert_upper(last).T
    root[:half, :half] = upper_root(matrix[:half, :half] - beside @ beside.T)
    return root


def invert_upper(upper: torch.Tensor) -> torch.Tensor:
    """Of an upper triangular matrix, by halves: a third of the work of a triangular solve with the identity."""
    size, half = len(upper), len(upper) // 2
    if size <= LEAF:
        with one_thread():
            return torch.linalg.solve_triangular(
                upper, torch.eye(size, dtype=upper.dtype, device=upper.device), upper=True
            )
    first, last = invert_upper(upper[:half, :half]), invert_upper(upper[half:, half:])
    inverse = torch.zeros_like(upper)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = (first @ (upper[:half, half:] @ last)).neg_()
    return inverse


def eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues of a symmetric matrix, the least first, and eigenvectors as columns."""
    with one_thread():
        values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Q of the thin QR decomposition: orthonormal columns that span those given."""
    with one_thread():
        return torch.linalg.qr(columns).Q
