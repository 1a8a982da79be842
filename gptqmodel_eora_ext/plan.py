"""What budgets will buy, told before anything is quantised: predicted loss against bytes.

Losses are ½ Σ tr(G ΔW C ΔWᵀ) over all modules, in nats a token where G is of the loss's gradient, with weights rounded
to nearest: to compare points by, not to take for the loss that will be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .budget import ModuleShape, budget_bytes, factor_bytes
from .ranks import most_rank, rank_options
from .refine.forecast import forecast_gains, round_to_nearest
from .refine.sensitivity import Sensitivity
from .solve import allocate, rank_curve

SWEEP = ("0.0625bpw", "0.125bpw", "0.25bpw", "0.5bpw", "0.75bpw", "1.0bpw", "1.5bpw")
# A plain b-bit model beside the one of b + 1 bits shows from where on an adapter is the worse buy.
MOST_BITS = 4
SCALE_BITS = 16


@dataclass(frozen=True)
class Point:
    """One way to store the model.

    Attributes:
        bits: of the weights.
        factor_bits: of the adapter; 0 without one.
        ranks: "none", "uniform" or "auto".
        budget: as it was asked for; empty without an adapter.
        adapter_bytes: of all factors, scales included.
        total_bytes: with the quantised weights, their scales and zeros.
        bpw: total bits per quantised weight.
        loss: predicted.
        dominated: another point is no larger and no worse. A model without an adapter is never marked: rounded to
            nearest, outlier channels cost it far more than GPTQ lets them.
        knee: beyond it, a byte buys less than on average.
    """

    bits: int
    factor_bits: int
    ranks: str
    budget: str
    adapter_bytes: int
    total_bytes: int
    bpw: float
    loss: float
    dominated: bool = False
    knee: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Module:
    """A module at some width of its weights: loss without an adapter, and what components take off, strongest first."""

    shape: ModuleShape
    total: float
    gains: torch.Tensor


def plan_points(
    shapes: Sequence[ModuleShape],
    weights: Mapping[str, torch.Tensor],
    sensitivity: Sensitivity,
    *,
    bits: int,
    group_size: int,
    factor_bits: Sequence[int],
    budgets: Sequence[str] = SWEEP,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Point]:
    """Points over a sweep of budgets, uniform beside chosen ranks, and the plain models of ``bits`` and one bit more.

    Args:
        shapes: the modules to quantise.
        weights: W of each, out × in.
        sensitivity: of the model.
        bits: of the weights.
        group_size: weights per scale; -1 for whole rows.
        factor_bits: widths of factors to compare.
        budgets: in the forms of `budget.FORM`.
        progress: wraps the modules, to show how far the forecasts are.

    Raises:
        ValueError: for a budget in no known form.
    """
    sizes = {budget: budget_bytes(budget, shapes) for budget in budgets}
    most = max(most_rank(shapes, size, width) for size in sizes.values() for width in factor_bits)
    modules, more_bits_loss = [], 0.0
    for shape in progress(shapes):
        weight = weights[shape.name].to(torch.float32)
        total, gains = forecast_gains(
            shape.name, weight - round_to_nearest(weight, bits, group_size), sensitivity, min(most, *weight.shape)
        )
        modules.append(_Module(shape, total, gains))
        if bits < MOST_BITS:
            delta = weight - round_to_nearest(weight, bits + 1, group_size)
            more_bits_loss += forecast_gains(shape.name, delta, sensitivity, 0)[0]
    points = [_plain(shapes, bits, group_size, sum(module.total for module in modules))]
    if bits < MOST_BITS:
        points.append(_plain(shapes, bits + 1, group_size, more_bits_loss))
    for width in factor_bits:
        swept = [
            ranks(modules, points[0], budget, size, width)
            for budget, size in sizes.items()
            for ranks in (_uniform, _chosen)
        ]
        points += _with_knee(points[0], swept)
    return [
        replace(point, dominated=point.factor_bits > 0 and any(_beats(other, point) for other in points))
        for point in points
    ]


def _plain(shapes: Sequence[ModuleShape], bits: int, group_size: int, loss: float) -> Point:
    total = 0
    for shape in shapes:
        groups = 1 if group_size == -1 else -(-shape.in_features // group_size)
        total += shape.weights * bits // 8 + groups * shape.out_features * (SCALE_BITS + bits) // 8
    return Point(bits, 0, "none", "", 0, total, _bpw(shapes, total), loss)


def _with_adapter(
    modules: Sequence[_Module], plain: Point, width: int, kind: str, budget: str, nbytes: int, loss: float
) -> Point:
    total = plain.total_bytes + nbytes
    bpw = _bpw([module.shape for module in modules], total)
    return Point(plain.bits, width, kind, budget, nbytes, total, bpw, loss)


def _uniform(modules: Sequence[_Module], plain: Point, budget: str, size: int, width: int) -> Point:
    rank = size // sum(factor_bytes(1, module.shape, width) for module in modules)
    nbytes = sum(factor_bytes(min(rank, len(module.gains)), module.shape, width) for module in modules)
    loss = sum(module.total - float(module.gains[:rank].sum()) for module in modules)
    return _with_adapter(modules, plain, width, "uniform", budget, nbytes, loss)


def _chosen(modules: Sequence[_Module], plain: Point, budget: str, size: int, width: int) -> Point:
    most = most_rank([module.shape for module in modules], size, width)
    curves = []
    for module in modules:
        options = rank_options(module.shape, most, width)
        curves.append(rank_curve(module.gains, module.total, options.ranks, options.nbytes))
    picked = [(curve, index) for curve, index in zip(curves, allocate(curves, size), strict=True)]
    nbytes = sum(curve.nbytes[index] for curve, index in picked)
    return _with_adapter(modules, plain, width, "auto", budget, nbytes, sum(curve.losses[i] for curve, i in picked))


def _with_knee(plain: Point, swept: Sequence[Point]) -> list[Point]:
    """Mark the point of chosen ranks that lies farthest below the line from no adapter to the largest budget."""
    chosen = [point for point in swept if point.ranks == "auto"]
    last = max(chosen, key=lambda point: point.total_bytes)
    width, height = last.total_bytes - plain.total_bytes, plain.loss - last.loss

    def below(point: Point) -> float:
        return (plain.loss - point.loss) / (height or 1) - point.adapter_bytes / (width or 1)

    knee = max(chosen, key=below)
    return [replace(point, knee=point is knee) for point in swept]


def _beats(other: Point, point: Point) -> bool:
    no_worse = other.total_bytes <= point.total_bytes and other.loss <= point.loss
    return no_worse and (other.total_bytes, other.loss) != (point.total_bytes, point.loss)


def _bpw(shapes: Sequence[ModuleShape], nbytes: int) -> float:
    return 8 * nbytes / sum(shape.weights for shape in shapes)
