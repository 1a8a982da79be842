"""Bits and rank of every module under one total size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..formats.sizes import ModuleShape, weight_bytes
from ..solve import MOST_STEPS, Grid, allocate
from .file import QUANTIZERS, ModulePlan, Plan
from .forecast import Forecast
from .modules import PlannedModule, bits_per_weight, choice_curve, plain_bytes, undominated
from .ranks import most_rank

# A plan's total is divided into this many steps, in which sizes are counted. Sizes are rounded up to whole steps, and
# the bytes that stay unused for that are below 0.2 % of SmolLM2's.
STEPS = 100_000


@dataclass(frozen=True)
class Mix:
    """A choice for every module, in their order.

    Attributes:
        bits: of each module's weights.
        ranks: of each module's adapter.
        loss: predicted loss of all modules together.
        adapter_bytes: bytes of all factors, scales included.
        total_bytes: those, and the bytes of weights, scales and zeros.
    """

    bits: tuple[int, ...]
    ranks: tuple[int, ...]
    loss: float
    adapter_bytes: int
    total_bytes: int


def largest_rank(shapes: Sequence[ModuleShape], total: int, bits: int, group_size: int, factor_bits: int) -> int:
    """The largest rank that a module may choose when all weights have ``bits`` and the rest of ``total`` is factors."""
    return most_rank(shapes, max(total - plain_bytes(shapes, bits, group_size), 0), factor_bits)


def mixed(
    modules: Sequence[PlannedModule], total: int, grid: Grid, factor_bits: int, *, steps: int = MOST_STEPS
) -> Mix:
    """The bits and ranks of least predicted loss within ``total`` bytes.

    Args:
        modules: with forecasts at every width on offer.
        total: bytes of weights, scales, zeros and factors.
        grid: how weights are rounded.
        factor_bits: of stored factors.
        steps: that the total is divided into.

    Raises:
        ValueError: when even the fewest bits do not fit.
    """
    shapes = [module.shape for module in modules]
    narrowest = [min(module.forecasts) for module in modules]
    fewest = min(narrowest)
    least = sum(weight_bytes(shape, bits, grid.group_size) for shape, bits in zip(shapes, narrowest, strict=True))
    if total < least:
        raise ValueError(
            f"a total of {total} bytes ({bits_per_weight(shapes, total):.3f} bpw) is below what {fewest} bits in "
            f"groups of {grid.group_size} take, scales and zeros included: {least} bytes "
            f"({bits_per_weight(shapes, least):.3f} bpw). Allow more, or take larger groups."
        )
    most = most_rank(shapes, total - least, factor_bits)
    choices = [_choices(module, most, grid.group_size, factor_bits) for module in modules]
    picked = allocate([choice_curve(options) for options in choices], total, steps=steps)
    taken = [options[index] for options, index in zip(choices, picked, strict=True)]
    weights = sum(weight_bytes(shape, one.bits, grid.group_size) for shape, one in zip(shapes, taken, strict=True))
    spent = sum(one.nbytes for one in taken)
    return Mix(
        tuple(one.bits for one in taken),
        tuple(one.rank for one in taken),
        sum(one.loss for one in taken),
        spent - weights,
        spent,
    )


def _without_adapter(module: PlannedModule) -> PlannedModule:
    """The module with rank 0 alone on offer."""
    forecasts = {bits: Forecast(known.total, known.gains[:0]) for bits, known in module.forecasts.items()}
    return PlannedModule(module.shape, forecasts)


@dataclass(frozen=True)
class _Choice:
    """A width and a rank for a module, with the bytes and the predicted loss of both together."""

    nbytes: int
    loss: float
    bits: int
    rank: int


def _choices(module: PlannedModule, most: int, group_size: int, factor_bits: int) -> list[_Choice]:
    """What a module may take, ascending in bytes, without what is larger and no better."""
    found = []
    for bits in module.forecasts:
        ranks, curve = module.curve(bits, most, factor_bits, by_gain=False)
        stored = weight_bytes(module.shape, bits, group_size)
        for rank, nbytes, loss in zip(ranks, curve.nbytes, curve.losses, strict=True):
            found.append(_Choice(stored + nbytes, loss, bits, rank))
    return undominated(found)


def mixed_with_adapter(
    modules: Sequence[PlannedModule],
    total: int,
    grid: Grid,
    factor_bits: int,
    *,
    adapter: int,
    steps: int = MOST_STEPS,
) -> Mix:
    """As `mixed`, with ``adapter`` bytes kept for factors: widths are chosen for the others, then ranks for the rest.

    Forecasts know what factors take off a module's own error. What they take off when they are trained together they do
    not know, so `mixed` alone gives them less than what a recipe that trains them can use. Where the fewest bits leave
    less than ``adapter``, that is what factors get.

    Args:
        modules, total, grid, factor_bits, steps: as for `mixed`.
        adapter: bytes of factors, scales included.

    Raises:
        ValueError: when even the fewest bits do not fit.
    """
    shapes = [module.shape for module in modules]
    least = plain_bytes(shapes, min(modules[0].forecasts), grid.group_size)
    plain = [_without_adapter(one) for one in modules]
    widths = mixed(plain, max(total - adapter, min(total, least)), grid, factor_bits, steps=steps).bits
    narrowed = [
        PlannedModule(one.shape, {bits: one.forecasts[bits]}) for one, bits in zip(modules, widths, strict=True)
    ]
    return mixed(narrowed, total, grid, factor_bits, steps=steps)


def planned(
    modules: Sequence[PlannedModule],
    total: int,
    grid: Grid,
    factor_bits: int,
    *,
    model: str,
    sensitivity: str,
    adapter: int = 0,
    quantizer: str = QUANTIZERS[0],
) -> Plan:
    """The plan of a total size.

    Args:
        modules: with forecasts at every width on offer.
        total: bytes of weights, scales, zeros and factors.
        grid: how weights are rounded.
        factor_bits: of stored factors.
        model: its name or folder, for the record.
        sensitivity: kind that losses are predicted by, for the record.
        adapter: bytes that are kept for factors (`mixed_with_adapter`); 0 to leave that to the forecasts.
        quantizer: that losses are predicted for.

    Raises:
        ValueError: when even the fewest bits do not fit.
    """
    if adapter:
        found = mixed_with_adapter(modules, total, grid, factor_bits, adapter=adapter, steps=STEPS)
    else:
        found = mixed(modules, total, grid, factor_bits, steps=STEPS)
    return Plan(
        model=model,
        sensitivity=sensitivity,
        group_size=grid.group_size,
        sym=grid.sym,
        mse=grid.scale_search,
        factor_bits=factor_bits,
        total_bytes=found.total_bytes,
        adapter_bytes=found.adapter_bytes,
        predicted_loss=found.loss,
        modules={
            module.shape.name: ModulePlan(module.shape.out_features, module.shape.in_features, bits, rank)
            for module, bits, rank in zip(modules, found.bits, found.ranks, strict=True)
        },
        quantizer=quantizer,
    )
