"""What a refinement has come to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .factors import Stored

# Why a run ended.
COMPLETE, STALE, NOT_FINITE, DIVERGENCE, INTERRUPTED = (
    "complete", "no better for a while", "a loss that is not finite", "divergence", "interrupted"
)  # fmt: skip
# Reasons after which a run can go on where it was.
RESUMABLE = (INTERRUPTED,)


@dataclass
class Outcome:
    """What a run has come to.

    Attributes:
        before: validation loss of the factors as they were stored before.
        after: of the best state, as it is stored.
        best: that state; None where nothing was better than the start.
        best_step: steps after which it was found.
        steps: that were taken.
        planned: steps of a run that nothing ends.
        ended: why the run ended.
        validations: (steps, loss) of each.
        seconds: spent, those of earlier runs that this one went on from included.
    """

    before: float = math.nan
    after: float = math.nan
    best: Stored | None = None
    best_step: int = 0
    steps: int = 0
    planned: int = 0
    ended: str = COMPLETE
    validations: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def stale(self) -> int:
        """Validations since the best."""
        return sum(step > self.best_step for step, _ in self.validations)

    def described(self) -> dict[str, Any]:
        """Steps, losses and what ended it: ready for JSON."""
        return {
            "steps": self.steps,
            "planned_steps": self.planned,
            "best_step": self.best_step,
            "before": self.before,
            "after": self.after,
            "ended": self.ended,
            "validations": [[step, loss] for step, loss in self.validations if math.isfinite(loss)],
            "seconds": round(self.seconds, 3),
        }
