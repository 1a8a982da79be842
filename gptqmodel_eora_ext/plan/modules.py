"""Forecasts of all modules at all widths: what both sweeps and mixes are computed from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..adapter.vocabulary import FACTOR_BITS
from ..formats.sizes import ModuleShape, factor_bytes, weight_bytes
from ..solve import Curve, Grid, rank_curve
from .forecast import Forecast
from .ranks import rank_options
from .sweep import Question, Rounding, Swept

# Widths of weights that are planned with; all have kernels.
PLANNED_BITS = (2, 3, 4)
# In a mix, factors may take this many bits per weight. For 2 bits per weight, 2-bit weights can become 4-bit weights,
# and beyond that price wider weights are the better buy.
WORTH_BITS = 2
# Rounded factors take less off the error than exact ones; this is the share that is left, by bits of a factor. In 4
# bits at rank 120 the error is 0.3213 in place of 0.3073 (docs/method.md). In 8 bits the difference does not show.
KEPT_BY_ROUNDING = {16: 1.0, 8: 1.0, 4: (1 - 0.3213) / (1 - 0.3073)}


@dataclass(frozen=True)
class PlannedModule:
    """A module and its forecasts.

    Attributes:
        shape: name, out_features and in_features.
        forecasts: bits of the weights → forecast.
    """

    shape: ModuleShape
    forecasts: Mapping[int, Forecast]

    def loss(self, bits: int, rank: int = 0, factor_bits: int = 16) -> float:
        """Predicted loss with the first ``rank`` components, which are those that a fixed rank keeps.

        Args:
            bits: of the weights.
            rank: 0 for no adapter.
            factor_bits: of the factors.
        """
        known = self.forecasts[bits]
        left = known.total - KEPT_BY_ROUNDING[factor_bits] * float(known.gains[:rank].sum())
        return max(left, 0.0)

    def curve(self, bits: int, most: int, factor_bits: int, *, by_gain: bool) -> tuple[tuple[int, ...], Curve]:
        """Ranks up to ``most``, and the curve of their factors' bytes and of the loss that they leave.

        Args:
            bits: of the weights.
            most: largest rank.
            factor_bits: of the factors.
            by_gain: the components that gain most are kept, as under a budget; otherwise the first, as a fixed rank
                keeps them.
        """
        known = self.forecasts[bits]
        options = rank_options(self.shape, min(most, len(known.gains)), factor_bits)
        gains = known.gains.sort(descending=True).values if by_gain else known.gains
        return options.ranks, rank_curve(
            KEPT_BY_ROUNDING[factor_bits] * gains, known.total, options.ranks, options.nbytes
        )


def plan_question(
    shapes: Sequence[ModuleShape],
    grid: Grid,
    *,
    most: int,
    swept: int = PLANNED_BITS[0],
    bits: Sequence[int] = PLANNED_BITS,
) -> Question:
    """What a plan asks of a sweep through the model: every module rounded at every width as GPTQ will.

    Args:
        shapes: the modules to quantise.
        grid: how weights are rounded.
        most: number of components to forecast at the width ``swept``; at others it is limited to what can ever pay
            (`WORTH_BITS`).
        swept: bits of the weights that a sweep of budgets is made for.
        bits: widths to forecast.
    """
    by_name = {shape.name: shape for shape in shapes}

    def rank(name: str, width: int) -> int:
        shape = by_name[name]
        rank = min(most, shape.out_features, shape.in_features)
        return rank if width == swept else min(rank, _worth(shape))

    return Question(lambda name: Rounding(tuple(bits), grid), rank)


def planned_modules(shapes: Sequence[ModuleShape], found: Swept) -> list[PlannedModule]:
    """Modules with their forecasts, in the order of ``shapes``."""
    return [PlannedModule(shape, found.forecasts[shape.name]) for shape in shapes]


def _worth(shape: ModuleShape) -> int:
    """The rank whose factors, stored in the fewest bits, take `WORTH_BITS` bits per weight."""
    return WORTH_BITS * shape.weights // (8 * factor_bytes(1, shape, min(FACTOR_BITS)))


class Priced(Protocol):
    """A choice for a module, with its bytes and the predicted loss."""

    @property
    def nbytes(self) -> int: ...

    @property
    def loss(self) -> float: ...


Choice = TypeVar("Choice", bound=Priced)


def undominated(choices: Iterable[Choice]) -> list[Choice]:
    """Choices ascending in bytes, without what is larger and no better."""
    found = sorted(choices, key=lambda one: (one.nbytes, one.loss))
    kept = found[:1]
    for one in found[1:]:
        if one.loss < kept[-1].loss:
            kept.append(one)
    return kept


def choice_curve(choices: Sequence[Priced]) -> Curve:
    """Loss against bytes of choices that `undominated` has left."""
    return Curve(tuple(one.nbytes for one in choices), tuple(one.loss for one in choices))


def plain_bytes(shapes: Iterable[ModuleShape], bits: int, group_size: int) -> int:
    """Bytes of all modules at one width, without adapters."""
    return sum(weight_bytes(shape, bits, group_size) for shape in shapes)


def bits_per_weight(shapes: Iterable[ModuleShape], nbytes: int) -> float:
    """Bits that ``nbytes`` are for each quantised weight."""
    return 8 * nbytes / sum(shape.weights for shape in shapes)
