"""Pruning a weight matrix: which weights become 0, and what the others become to make up for it.

| method | keeps the weights with the largest | the others |
|---|---|---|
| magnitude | |w| | stay |
| Wanda (arXiv 2306.11695) | |w| · √E[x²] | stay |
| SparseGPT (arXiv 2301.00774) | w² / pivot², column after column | change so that the output changes least |

The pivots are the diagonal of the upper Cholesky factor of C⁻¹: w² / pivot² is what the squared error of the output
grows by if w becomes 0 and all later weights of its row adapt.

Magnitude compares all weights of a matrix, Wanda those of a row, SparseGPT those of a block of 128 columns, as their
authors do. In a pattern n:m all compare the m weights of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats.sparsity import Pattern
from .gptq import SPREAD_BLOCK, Grid, column_order, group_scales, spread_errors
from .moments import Moment, diagonal_of

MAGNITUDE, WANDA, SPARSEGPT = "magnitude", "wanda", "sparsegpt"
METHODS = (SPARSEGPT, WANDA, MAGNITUDE)
# Share of C's mean diagonal that is added to it; that of the SparseGPT article.
PRUNING_DAMPING = 0.01


def prune(weight: torch.Tensor, second_moment: Moment, pattern: Pattern, method: str) -> torch.Tensor:
    """Return a pruned copy of a weight matrix.

    Args:
        weight: W, out × in, any floating dtype.
        second_moment: C = E[x xᵀ], in × in, or the rows that it is of; for Wanda its diagonal is enough, and for
            magnitude it is not looked at.
        pattern: of the zeros. Its groups have to divide in.
        method: one of `METHODS`.

    Returns:
        Ŵ, out × in, float32. SparseGPT takes two copies of W beside it, and four of C.

    Raises:
        ValueError: for another method, or groups that do not divide in.

    Example:
        >>> pruned = prune(weight, second_moment, Pattern.parse("2:4"), "sparsegpt")
    """
    pattern.check(weight.shape[1], "weight")
    if method == SPARSEGPT:
        return sparsegpt(weight, second_moment, pattern)
    scores = weight.to(torch.float32).abs()
    if method == WANDA:
        scores *= diagonal_of(second_moment).to(torch.float32).sqrt()
    elif method != MAGNITUDE:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    return weight.to(torch.float32) * kept_weights(scores, pattern, by_row=method == WANDA)


def kept_weights(scores: torch.Tensor, pattern: Pattern, *, by_row: bool) -> torch.Tensor:
    """True for the weights with the largest scores, exactly as many as a pattern leaves.

    Args:
        scores: out × in.
        pattern: of the zeros.
        by_row: without n:m, whether the weights of each row compete, in place of those of the whole matrix.
    """
    rows, columns = scores.shape
    if pattern.of:
        groups, kept = scores.view(rows, columns // pattern.of, pattern.of), pattern.kept
    else:
        groups = scores if by_row else scores.reshape(1, -1)
        kept = groups.shape[1] - round(pattern.share * groups.shape[1])
    mask = torch.zeros_like(groups, dtype=torch.bool)
    # `topk` picks so many places whatever is equal; a threshold would pick more or fewer.
    return mask.scatter_(-1, groups.topk(kept, dim=-1).indices, True).view(rows, columns)


def sparsegpt(
    weight: torch.Tensor, second_moment: Moment, pattern: Pattern, *, damping: float = PRUNING_DAMPING
) -> torch.Tensor:
    """SparseGPT: prune columns one after another, each one's error spread over those that follow.

    Args:
        weight: W, out × in.
        second_moment: C, in × in, or the rows that it is of, or its diagonal, where no error is spread.
        pattern: of the zeros; m of n:m has to divide `SPREAD_BLOCK` as well as in.
        damping: share of C's mean diagonal that is added to it.

    Returns:
        Ŵ, out × in, float32.

    Raises:
        ValueError: for a pattern whose groups are not in step with the blocks.
    """
    return _sparse(weight, second_moment, pattern, damping, None).weight


@dataclass(frozen=True)
class SparseCodes:
    """A matrix that was pruned and rounded at once.

    Attributes:
        weight: Ŵ, out × in, float32: codes less zeros, times scales; exactly 0 where it was pruned.
        scales: out × groups, float32.
        zeros: the code that stands for 0, out × groups, float32.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def sparsegpt_codes(
    weight: torch.Tensor,
    second_moment: Moment,
    pattern: Pattern,
    bits: int,
    grid: Grid,
    *,
    damping: float = PRUNING_DAMPING,
) -> SparseCodes:
    """SparseGPT's joint form: a column's pruned weights become 0, the others are rounded, and both errors are spread.

    Args:
        weight: W, out × in.
        second_moment: as for `sparsegpt`.
        pattern: of the zeros.
        bits: of a code.
        grid: what is rounded to. Its groups keep the order of the columns.
        damping: share of C's mean diagonal that is added to it.

    Raises:
        ValueError: as `sparsegpt`.
    """
    return _sparse(weight, second_moment, pattern, damping, (bits, grid))


def _sparse(
    weight: torch.Tensor, second_moment: Moment, pattern: Pattern, damping: float, codes: tuple[int, Grid] | None
) -> SparseCodes:
    pattern.check(weight.shape[1], "weight")
    if pattern.of and SPREAD_BLOCK % pattern.of:
        raise ValueError(f"SparseGPT takes patterns whose groups divide {SPREAD_BLOCK}, got {pattern}.")
    # The order of columns is kept: groups of a pattern are neighbours.
    columns = column_order(second_moment, -1, damping, by_energy=False)
    work = weight.to(torch.float32).T.masked_fill(columns.dead[:, None], 0.0)
    costs = columns.pivots.square().reciprocal()[:, None]
    mask = torch.empty_like(work, dtype=torch.bool)
    scales: list[torch.Tensor] = []
    zeros: list[torch.Tensor] = []
    bits, grid = codes or (0, Grid(-1))
    size = len(work) if grid.group_size == -1 else grid.group_size
    top = torch.full((work.shape[1],), float((1 << bits) - 1), device=work.device)

    def choose(first: int, behind: int) -> None:
        scores = work[first:behind].square() * costs[first:behind]
        mask[first:behind] = kept_weights(scores.T.contiguous(), pattern, by_row=False).T

    def begin(start: int, end: int) -> None:
        if not pattern.of:
            choose(start, end)
        for first in range(-(-start // size) * size, end, size) if codes else ():
            scale, zero = group_scales(work[first : first + size], top, grid)
            scales.append(scale)
            zeros.append(zero.expand_as(scale))

    def replace(column: int, values: torch.Tensor, code: torch.Tensor) -> None:
        if pattern.of and column % pattern.of == 0:
            choose(column, column + pattern.of)
        torch.mul(values, mask[column], out=code)
        if codes:
            scale, zero = scales[column // size], zeros[column // size]
            code.div_(scale).round_().clamp_(-zero, top - zero).mul_(scale)

    found = spread_errors(work, columns.factor, begin, replace).T.contiguous()
    none = found.new_empty(len(found), 0)
    return SparseCodes(found, *(torch.stack(one, dim=1) if one else none for one in (scales, zeros)))
