"""GPTQ (arXiv 2210.17323) in float32: how a host's quantiser will round a weight, told before it does.

Columns are rounded one after another, and each column's error is spread over those that follow so that the output of
the module changes least. As GPTQModel does by default: columns in order of E[x²] within their groups and groups in
order of their largest (GAR, arXiv 2505.14638), damping by a share of the mean diagonal, scales from the largest value
of a group or by a search. Rows are independent, so several widths of one weight are rounded at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .decompositions import invert_upper, upper_root
from .moments import Moment, RowMoment, diagonal_of

# Share of C's mean diagonal that is added to it; GPTQModel's default.
DAMPING = 0.05
# Columns after which scales are found anew from weights that carry all earlier errors; GPTQModel's block.
SCALE_BLOCK = 128
# Within so many columns errors are spread column by column, to later ones by one matrix product. The result is the same
# for any width; only the time differs.
SPREAD_BLOCK = 32
# The search for scales tries these shares of a group's largest value as the end of the grid, then finer steps about the
# best of them. GPTQModel tries 80 shares.
SHRINKING = tuple(1 - 0.1 * step for step in range(8))
REFINEMENT = 0.05


@dataclass(frozen=True)
class Grid:
    """What weights are rounded to.

    Attributes:
        group_size: weights per scale along a row; -1 for the whole row. A last shorter group is allowed.
        sym: whether the grid is symmetric about 0.
        scale_search: exponent of the error that scales minimise (GPTQModel's `mse`); 0 takes a group's largest value.
    """

    group_size: int
    sym: bool = True
    scale_search: float = 0.0


@dataclass(frozen=True)
class ColumnOrder:
    """What rounding needs of a second moment.

    Attributes:
        order: columns in the order in which they are rounded; groups stay together.
        factor: R, upper triangular, Rᵀ R = (C + damping)⁻¹ of the ordered columns, each row divided by its diagonal,
            float32; None for a diagonal C, where no error is spread.
        pivots: the diagonal of R, in order. Setting a weight w of a column to 0 costs (w / pivot)² once those after it
            have made up for what they can. For a diagonal C the same, 1 / √(C + damping).
        dead: columns whose input is always 0, in order.
    """

    order: torch.Tensor
    factor: torch.Tensor | None
    pivots: torch.Tensor
    dead: torch.Tensor


def column_order(
    second_moment: Moment, group_size: int, damping: float = DAMPING, *, by_energy: bool = True
) -> ColumnOrder:
    """Prepare to round weights of modules that share an input.

    Takes some four matrices of in × in beside C, whatever form C has: its damped inverse is of full rank.

    Args:
        second_moment: C, in × in, or the rows that it is of, or its diagonal.
        group_size: weights per scale; -1 for whole rows.
        damping: share of the mean diagonal that is added to it.
        by_energy: whether columns of large inputs come first; otherwise they keep their order.
    """
    diagonal = diagonal_of(second_moment).to(torch.float32)
    order = _by_energy(diagonal, group_size) if by_energy else torch.arange(len(diagonal), device=diagonal.device)
    dead = diagonal[order] == 0
    if second_moment.ndim == 1:
        damped_diagonal = diagonal[order].masked_fill(dead, 1.0)
        return ColumnOrder(order, None, (damped_diagonal + damping * damped_diagonal.mean()).rsqrt(), dead)
    if isinstance(second_moment, RowMoment):
        damped = RowMoment(second_moment.rows[:, order], second_moment.count).dense()
    else:
        damped = second_moment.to(torch.float32)[order][:, order]
    steps = damped.diagonal()
    steps.masked_fill_(dead, 1.0)
    steps += damping * steps.mean()
    upper = upper_root(damped)
    # Each takes as much as C; no more than three of them are there at a time.
    del damped, steps
    factor = invert_upper(upper)
    del upper
    pivots = factor.diagonal().clone()
    return ColumnOrder(order, factor.div_(pivots[:, None]), pivots, dead)


def _by_energy(diagonal: torch.Tensor, group_size: int) -> torch.Tensor:
    width = len(diagonal)
    if group_size == -1:
        return diagonal.argsort(descending=True, stable=True)
    whole = width // group_size * group_size
    energies, inside = diagonal[:whole].view(-1, group_size).sort(dim=1, descending=True)
    starts = torch.arange(0, whole, group_size, device=diagonal.device)
    groups = energies.amax(1).argsort(descending=True, stable=True) if whole else starts
    tail = torch.arange(whole, width, device=diagonal.device)
    return torch.cat([(inside + starts[:, None])[groups].flatten(), tail])


def gptq(weight: torch.Tensor, columns: ColumnOrder, bits: Sequence[int], grid: Grid) -> list[torch.Tensor]:
    """Ŵ at each of some widths.

    Args:
        weight: W, out × in.
        columns: of the module's input.
        bits: widths.
        grid: what is rounded to.

    Returns:
        out × in, float32, one for each width.
    """
    out_features, in_features = weight.shape
    size = in_features if grid.group_size == -1 else grid.group_size
    # The transpose is kept in memory, so that each column is read and written as one run.
    ordered = weight.to(torch.float32).T[columns.order].masked_fill(columns.dead[:, None], 0.0)
    work = ordered.repeat(1, len(bits))
    top = torch.tensor([(1 << width) - 1 for width in bits], device=work.device, dtype=work.dtype)
    top = top.repeat_interleave(out_features)
    # Step, and the least and the largest code less the zero, of each group.
    scales: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def begin(start: int, end: int) -> None:
        for first in range(-(-start // size) * size, end, size):
            scale, zero = group_scales(work[first : first + size], top, grid)
            scales[first // size] = scale, -zero, top - zero

    def round_column(column: int, values: torch.Tensor, code: torch.Tensor) -> None:
        scale, lowest, highest = scales[column // size]
        torch.div(values, scale, out=code).round_().clamp_(lowest, highest).mul_(scale)

    rounded = spread_errors(work, columns.factor, begin, round_column)
    restored = torch.empty_like(rounded)
    restored[columns.order] = rounded
    return [one.T.contiguous() for one in restored.split(out_features, dim=1)]


def spread_errors(
    work: torch.Tensor,
    factor: torch.Tensor | None,
    begin: Callable[[int, int], None],
    round_column: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> torch.Tensor:
    """Replace columns of W one after another, and spread each one's error over those that follow.

    Args:
        work: Wᵀ, in × rows, columns of W in the order in which they are replaced; used up.
        factor: of `ColumnOrder`; None to spread nothing.
        begin: called before each `SCALE_BLOCK` of columns with its first and the one behind its last, when ``work``
            holds them with all earlier errors.
        round_column: column's number, its values with all earlier errors, and where to write what takes their place.

    Returns:
        What took their place, in × rows.
    """
    in_features = len(work)
    rounded = torch.empty_like(work)
    for start in range(0, in_features, SCALE_BLOCK):
        end = min(start + SCALE_BLOCK, in_features)
        begin(start, end)
        for low in range(start, end, SPREAD_BLOCK):
            high = min(low + SPREAD_BLOCK, end)
            block = work[low:high]
            spread = factor[low:high, low:high] if factor is not None else None
            for column, (values, code) in enumerate(zip(block.unbind(), rounded[low:high].unbind(), strict=True)):
                round_column(low + column, values, code)
                # What is left of the column is its error.
                values.sub_(code)
                if spread is not None:
                    block[column + 1 :].addr_(spread[column, column + 1 :], values, alpha=-1)
            if factor is not None:
                work[high:].addmm_(factor[low:high, high:].T, block, alpha=-1)
    return rounded


def group_scales(group: torch.Tensor, top: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and zero of each row of W, a column of ``group`` (weights of a group × rows)."""
    low, high = group.aminmax(dim=0)
    low, high = low.clamp_max(0), high.clamp_min(0)
    if grid.sym:
        high = torch.maximum(-low, high)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = (high - low) / top
    zero = (top + 1) / 2 if grid.sym else torch.round(-low / scale)
    if grid.scale_search == 0:
        return scale, zero
    lowest, highest = -zero, top - zero
    share, least = torch.ones_like(scale), torch.full_like(scale, torch.inf)

    def try_out(other: float | torch.Tensor) -> None:
        nonlocal share, least
        step = scale * other
        rounded = torch.div(group, step).round_().clamp_(lowest, highest).mul_(step)
        error = rounded.sub_(group).abs_().pow_(grid.scale_search).sum(0)
        better = error < least
        least, share = torch.where(better, error, least), torch.where(better, other, share)

    for coarse in SHRINKING:
        try_out(coarse)
    best = share
    for finer in (best - REFINEMENT, (best + REFINEMENT).clamp_max(1)):
        try_out(finer)
    return scale * share, zero
