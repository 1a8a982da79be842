"""Whether two models that answered the same items really differ: the paired bootstrap.

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13: items are drawn with replacement, the
same for both models, and the difference is taken anew each time; its 2.5 and 97.5 percentiles bound it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

# Draws; the bounds of the interval then move by about 1 % of its width from one seed to another.
RESAMPLES = 10_000
# Draws that are held at a time.
AT_ONCE = 500
CONFIDENCE = 95
# Of fewer items a bootstrap knows too few values to tell how far the next ones may lie.
LEAST_ITEMS = 10


@dataclass(frozen=True)
class Difference:
    """How much one model's mean is above another's.

    Attributes:
        value: on the items as they are.
        low, high: bounds of the 95 % interval; None where there are too few items to tell.
        items: how many both models answered.
    """

    value: float
    low: float | None
    high: float | None
    items: int

    @property
    def half_width(self) -> float | None:
        """Half of the interval: what stands after ±."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds 0, or there is none: the items do not tell the models apart."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def paired_difference(
    first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None, *, seed: int = 0
) -> Difference:
    """The mean of ``first`` less that of ``second``, over the same items.

    Args:
        first: a model's value for each item, summed over the item's tokens where it has ``weights``.
        second: another's, in the same order.
        weights: what sums are divided by, such as the tokens of windows; None for items that count the same.
        seed: of the draws.

    Raises:
        ValueError: when there is no item, or the models have not answered the same number.
    """
    if not len(first) == len(second) > 0:
        raise ValueError(f"a paired comparison needs the same items of both, got {len(first)} and {len(second)}.")
    gaps = numpy.subtract(first, second, dtype=numpy.float64)
    sizes = numpy.ones_like(gaps) if weights is None else numpy.asarray(weights, dtype=numpy.float64)
    count = len(gaps)
    value = float(gaps.sum() / sizes.sum())
    if count < LEAST_ITEMS:
        return Difference(value, None, None, count)
    draws = numpy.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES // AT_ONCE):
        drawn = draws.integers(count, size=(AT_ONCE, count))
        found.append(gaps[drawn].sum(1) / sizes[drawn].sum(1))
    tail = (100 - CONFIDENCE) / 2
    low, high = numpy.percentile(numpy.concatenate(found), [tail, 100 - tail])
    return Difference(value, float(low), float(high), count)
