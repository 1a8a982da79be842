"""An alarm when traffic has moved away from the text that an ensemble was made for: a sequential test on routing.

For every prompt the router tells which share p of the nearest class's held-out text is as far from its mean. While
traffic is like that text, p is uniform on 0 to 1, or larger; on text of another kind it is small. With e = ε p^(ε−1),
whose mean under a uniform p is 1, the Shiryaev–Roberts statistic

    R ← (R + 1) e,        the mean over some ε

grows by 1 a prompt at most on average while nothing has changed. So with an alarm at R ≥ c, the probability of a
false one within N prompts is at most N / c (Doob's inequality), and false ones are c prompts apart on average or more
(Shin, Ramdas and Rinaldo, "E-detectors", arXiv 2203.03532). It is looked at after every prompt; nothing has to be
known of when or how traffic changes, and mixtures of domains may change freely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# ε: small ones are quick where p is tiny, large ones notice where it is a little too small.
EXPONENTS = (0.1, 0.3, 0.5, 0.7)
# c: at most one false alarm in a hundred within a thousand prompts.
THRESHOLD = 100_000.0
# p is a share of some pieces of text, uncertain by its standard error, which is added to it: of so many pieces, fewer
# than a router holds out of a usual calibration.
PIECES = 64


@dataclass
class DriftTest:
    """The test, prompt by prompt.

    Attributes:
        threshold: c; within N prompts a false alarm has at most probability N / c.
        prompts: seen since the beginning.
        alarm: number of the prompt that raised the alarm; None while there is none. It stays until `reset`.

    Example:
        >>> test = DriftTest()
        >>> any(test.add(0.0) for _ in range(20))  # far from everything known
        True
    """

    threshold: float = THRESHOLD
    prompts: int = 0
    alarm: int | None = None
    _statistics: list[float] = field(default_factory=lambda: [0.0] * len(EXPONENTS))

    def add(self, tail: float) -> bool:
        """Take a prompt in.

        Args:
            tail: p, of `Routing.tails`.

        Returns:
            Whether there is an alarm, by this prompt or an earlier one.
        """
        self.prompts += 1
        p = min(1.0, tail + math.sqrt(tail * (1 - tail) / PIECES) + 1 / PIECES)
        self._statistics = [
            # Above the threshold its size says nothing more, and would overflow.
            min((one + 1) * exponent * p ** (exponent - 1), 1e6 * self.threshold)
            for one, exponent in zip(self._statistics, EXPONENTS, strict=True)
        ]
        if self.alarm is None and self.statistic >= self.threshold:
            self.alarm = self.prompts
        return self.alarm is not None

    @property
    def statistic(self) -> float:
        """R."""
        return sum(self._statistics) / len(self._statistics)

    def reset(self) -> None:
        """Begin anew, as after a domain was added."""
        self.alarm = None
        self._statistics = [0.0] * len(EXPONENTS)
