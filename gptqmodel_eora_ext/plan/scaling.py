"""Forecasts for a quantiser that rounds otherwise than they assume, scaled by what it leaves on a few modules."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .forecast import Forecast
from .ranks import kind_of
from .sweep import TINY, Swept

# What a quantiser leaves is compared on so many layers: the first, the last, and those evenly between them.
COMPARED_LAYERS = 3
# Steps a block of a quantiser that tunes, where nothing else is asked: a quarter of AutoRound's own default, since a
# plan goes by how kinds and widths compare.
TRIAL_ITERS = 50

# Kind of module and width → what the quantiser leaves, in terms of what was forecast.
Factors = Mapping[tuple[str, int], float]


def compared_layers(layers: Sequence[str], count: int = COMPARED_LAYERS) -> list[str]:
    """The layers to compare on: the first, the last, and what lies evenly between them; all of a small model."""
    if len(layers) <= count:
        return list(layers)
    return [layers[round(place * (len(layers) - 1) / (count - 1))] for place in range(count)]


def left_of_forecast(
    forecasts: Mapping[str, Mapping[int, Forecast]], found: Mapping[str, Mapping[int, Forecast]]
) -> dict[tuple[str, int], float]:
    """What a quantiser leaves of a module's predicted loss, by kind and width: the geometric mean over modules.

    Args:
        forecasts: full module name → width → forecast, by the rounding that forecasts assume.
        found: the same of the modules that the quantiser has rounded, from its own Ŵ.
    """
    logarithms: dict[tuple[str, int], list[float]] = defaultdict(list)
    for name, widths in found.items():
        for bits, one in widths.items():
            ratio = max(one.total, TINY) / max(forecasts[name][bits].total, TINY)
            logarithms[kind_of(name), bits].append(math.log(ratio))
    return {key: math.exp(sum(some) / len(some)) for key, some in logarithms.items()}


def scaled(found: Swept, factors: Factors) -> Swept:
    """Forecasts times the factors of their kinds and widths. A kind that was not compared gets the mean of its width.

    Args:
        found: forecasts of all modules.
        factors: of `left_of_forecast`.
    """
    means = {bits: _mean([one for (_, width), one in factors.items() if width == bits]) for _, bits in factors}
    return replace(
        found,
        forecasts={
            name: {bits: one.scaled(factors.get((kind_of(name), bits), means[bits])) for bits, one in widths.items()}
            for name, widths in found.forecasts.items()
        },
    )


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
