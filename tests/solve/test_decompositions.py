"""Decompositions: what they are, and that their bits do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.solve import NotDefinite, invert_upper, one_thread, orthonormal, square_root, upper_root
from gptqmodel_eora_ext.solve.decompositions import LEAF, eigh

# Widths of real models: sides that are no multiples of the kernels' tiles are cut by the number of threads.
SIZES = (64, LEAF, 576, 960)


def definite(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = torch.randn(2 * size + 8, size, generator=torch.Generator().manual_seed(size), dtype=dtype)
    return rows.T @ rows / len(rows) + 0.01 * torch.eye(size, dtype=dtype)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@given(size=st.integers(1, 400), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=30, deadline=None)
def test_root_and_inverse(size: int, dtype: torch.dtype) -> None:
    matrix = definite(size, dtype)
    root = upper_root(matrix)
    inverse = invert_upper(root)
    close = {"rtol": 0.0, "atol": 1e-4 if dtype is torch.float32 else 1e-11}
    assert torch.equal(root, root.triu()) and torch.equal(inverse, inverse.triu())
    torch.testing.assert_close(root @ root.T, matrix, **close)
    torch.testing.assert_close(inverse @ root, torch.eye(size, dtype=dtype), **close)
    # What GPTQ spreads errors by: the upper Cholesky factor of the inverse.
    expected = torch.linalg.cholesky(torch.linalg.inv(matrix.double()), upper=True)
    torch.testing.assert_close(inverse.double(), expected, rtol=1e-3, atol=close["atol"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("threads")
def test_bits_are_those_of_one_thread(size: int) -> None:
    """The products that the factors are made of, and everything made of them."""
    matrix, wide = definite(size), torch.randn(size, 4 * size, generator=torch.Generator().manual_seed(1))
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        root = upper_root(matrix)
        values, vectors = eigh(matrix)
        few = orthonormal(wide.T[:, : max(1, size // 4)])
        products = [matrix @ wide, wide @ wide.T]
        found.append([root, invert_upper(root), square_root(matrix), values, vectors, few, *products])
        assert torch.get_num_threads() == count
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("size", [3, LEAF + 30])
def test_what_is_not_definite_is_told(size: int) -> None:
    matrix = definite(size)
    matrix[1, 1] = -1.0
    with pytest.raises(NotDefinite, match="is not positive definite"):
        upper_root(matrix)
    # A moment of fewer rows than columns still has a root.
    rows = torch.randn(size // 2, size, generator=torch.Generator().manual_seed(0))
    root = square_root(rows.T @ rows)
    torch.testing.assert_close((root @ root.T).float(), rows.T @ rows, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("threads")
def test_one_thread_ends_with_the_block() -> None:
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="inside"), one_thread():
        assert torch.get_num_threads() == 1
        raise ValueError("inside")
    assert torch.get_num_threads() == 2
