"""Predicted loss against bytes over a sweep of budgets.

Losses are ½ E[(gᵀ ΔW x)²], summed over all modules: nats a token above the full-precision model's where g is the loss's
gradient. They rank choices; what is measured is larger, since errors compound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..adapter.budget import budget_bytes, largest_uniform_rank
from ..formats.sizes import ModuleShape, factor_bytes
from ..solve import Grid, allocate
from .mix import mixed
from .modules import PlannedModule, bits_per_weight, plain_bytes
from .ranks import least_budget, most_rank

SWEEP = ("0.0625bpw", "0.125bpw", "0.25bpw", "0.5bpw", "0.75bpw", "1.0bpw", "1.5bpw")
PLAIN, UNIFORM, CHOSEN, MIXED = "none", "uniform", "auto", "mixed"
PLAIN_TITLE = "plain"
# A plain model is marked as dominated by an adapter only where the adapter's predicted loss is lower by this factor,
# since predictions may favour adapters. On SmolLM2 the ratio of measured to predicted loss is, for adapters at 2 bits,
# 0.96 (WikiText-2) and 1.17 times (C4) that of plain 3 bits: 1.06 times in the mean.
MARGIN = 1.06


@dataclass(frozen=True)
class Point:
    """One way to store the model.

    Attributes:
        bits: of the weights; 0 where modules differ.
        factor_bits: of the adapter; 0 without one.
        ranks: "none", "uniform", "auto" (chosen), or "mixed" (bits and ranks chosen together).
        budget: as it was asked for; empty without an adapter.
        adapter_bytes: of all factors, scales included.
        total_bytes: with the quantised weights, their scales and zeros.
        bpw: total bits per quantised weight.
        loss: predicted loss above that of the full-precision model, nats a token.
        dominated_by: title of a choice that is no larger and no worse; empty when there is none. Mixes dominate
            nothing here: nearly every other choice is among those that a mix can make.
        knee: whether a byte beyond this point buys less than a byte does on average.
    """

    bits: int
    factor_bits: int
    ranks: str
    budget: str
    adapter_bytes: int
    total_bytes: int
    bpw: float
    loss: float
    dominated_by: str = ""
    knee: bool = False

    @property
    def title(self) -> str:
        """The choice in words, as tables and `dominated_by` call it."""
        if self.ranks == PLAIN:
            return f"{PLAIN_TITLE} {self.bits} bits"
        weights = "mixed bits" if self.ranks == MIXED else f"{self.bits} bits"
        return f"{weights} + {self.budget}, {self.ranks} ranks, {self.factor_bits}-bit factors"

    @property
    def dominated(self) -> bool:
        """Whether another choice is no larger and no worse."""
        return bool(self.dominated_by)

    def as_json(self) -> dict[str, Any]:
        """The attributes and `dominated`, ready for JSON."""
        return {**asdict(self), "dominated": self.dominated}


def affordable(shapes: Sequence[ModuleShape], budgets: Sequence[str], factor_bits: Sequence[int]) -> tuple[str, ...]:
    """Those of ``budgets`` that buy a component in at least one width of factors. A small model cannot spend the
    smallest budgets of a sweep.

    Raises:
        ValueError: for a budget in no known form.
    """
    least = min(least_budget(shapes, width) for width in factor_bits)
    return tuple(budget for budget in budgets if budget_bytes(budget, shapes) >= least)


def sweep_rank(shapes: Sequence[ModuleShape], budgets: Sequence[str], factor_bits: Sequence[int]) -> int:
    """How many components have to be forecast so that every budget of a sweep can be spent.

    Raises:
        ValueError: for a budget in no known form.
    """
    sizes = [budget_bytes(one, shapes) for one in budgets]
    return max((most_rank(shapes, size, width) for size in sizes for width in factor_bits), default=0)


def plan_points(
    modules: Sequence[PlannedModule],
    grid: Grid,
    *,
    bits: int,
    factor_bits: Sequence[int],
    budgets: Sequence[str] = SWEEP,
    with_mixes: bool = True,
) -> list[Point]:
    """The plain models of every width that was forecast; over a sweep of budgets, uniform beside chosen ranks on
    weights of ``bits``; and at the same totals, bits and ranks chosen together. A width of factors whose smallest
    adapter is above a budget has no point there.

    Args:
        modules: with forecasts of as many components as `sweep_rank` tells.
        grid: how weights are rounded.
        bits: of the weights.
        factor_bits: widths of factors to compare; mixes have the fewest.
        budgets: in the forms of `budget.FORM`.
        with_mixes: whether mixes are wanted, which take the longest.

    Raises:
        ValueError: for a budget in no known form.
    """
    shapes = [module.shape for module in modules]
    sizes = {budget: budget_bytes(budget, shapes) for budget in budgets}
    plains = {width: _plain(modules, width, grid) for width in modules[0].forecasts}
    points = list(plains.values())
    for width in factor_bits:
        swept = [
            ranks(modules, plains[bits], budget, size, width)
            for budget, size in sizes.items()
            if size >= least_budget(shapes, width)
            for ranks in (_uniform, _chosen)
        ]
        points += _with_knee(plains[bits], swept)
    points = [replace(point, dominated_by=_dominating(point, points)) for point in points]
    for budget, size in sizes.items() if with_mixes else ():
        found = mixed(modules, plains[bits].total_bytes + size, grid, min(factor_bits))
        points.append(
            Point(0, min(factor_bits), MIXED, budget, found.adapter_bytes, found.total_bytes,
                  bits_per_weight(shapes, found.total_bytes), found.loss)
        )  # fmt: skip
    return points


def _plain(modules: Sequence[PlannedModule], bits: int, grid: Grid) -> Point:
    shapes = [module.shape for module in modules]
    total = plain_bytes(shapes, bits, grid.group_size)
    loss = sum(module.loss(bits) for module in modules)
    return Point(bits, 0, PLAIN, "", 0, total, bits_per_weight(shapes, total), loss)


def _with_adapter(
    modules: Sequence[PlannedModule], plain: Point, width: int, kind: str, budget: str, nbytes: int, loss: float
) -> Point:
    total = plain.total_bytes + nbytes
    bpw = bits_per_weight([module.shape for module in modules], total)
    return Point(plain.bits, width, kind, budget, nbytes, total, bpw, loss)


def _uniform(modules: Sequence[PlannedModule], plain: Point, budget: str, size: int, width: int) -> Point:
    rank = largest_uniform_rank(size, [module.shape for module in modules], width)
    ranks = [min(rank, len(module.forecasts[plain.bits].gains)) for module in modules]
    nbytes = sum(factor_bytes(one, module.shape, width) for one, module in zip(ranks, modules, strict=True))
    loss = sum(module.loss(plain.bits, rank, width) for module in modules)
    return _with_adapter(modules, plain, width, UNIFORM, budget, nbytes, loss)


def _chosen(modules: Sequence[PlannedModule], plain: Point, budget: str, size: int, width: int) -> Point:
    most = most_rank([module.shape for module in modules], size, width)
    curves = [module.curve(plain.bits, most, width, by_gain=True)[1] for module in modules]
    picked = [(curve, index) for curve, index in zip(curves, allocate(curves, size), strict=True)]
    nbytes = sum(curve.nbytes[index] for curve, index in picked)
    return _with_adapter(modules, plain, width, CHOSEN, budget, nbytes, sum(curve.losses[i] for curve, i in picked))


def _with_knee(plain: Point, swept: Sequence[Point]) -> list[Point]:
    """Mark the point of chosen ranks that lies farthest below the line from no adapter to the largest budget."""
    chosen = [point for point in swept if point.ranks == CHOSEN]
    if not chosen:
        return []
    last = max(chosen, key=lambda point: point.total_bytes)
    width, height = last.total_bytes - plain.total_bytes, plain.loss - last.loss

    def below(point: Point) -> float:
        return (plain.loss - point.loss) / (height or 1) - point.adapter_bytes / (width or 1)

    knee = max(chosen, key=below)
    return [replace(point, knee=point is knee) for point in swept]


def _dominating(point: Point, points: Sequence[Point]) -> str:
    """The choice that dominates a point: a plain one if there is any, else that of least loss."""
    better = [other for other in points if _beats(other, point)]
    better.sort(key=lambda other: (other.ranks != PLAIN, other.loss))
    return better[0].title if better else ""


def _beats(other: Point, point: Point) -> bool:
    margin = MARGIN if point.ranks == PLAIN and other.ranks != PLAIN else 1.0
    no_worse = other.total_bytes <= point.total_bytes and margin * other.loss <= point.loss
    return no_worse and (other.total_bytes, other.loss) != (point.total_bytes, point.loss)
