"""The training itself: steps, validation, the best state, and what ends it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..system.distributed import by_first, current
from .evaluation import Evaluation
from .factors import TrainedFactors
from .muon import Muon, rate_of
from .outcome import COMPLETE, DIVERGENCE, INTERRUPTED, NOT_FINITE, RESUMABLE, STALE, Outcome
from .progress import Progress
from .settings import RefineSettings
from .shared import averaged
from .student import Student
from .teacher import Teacher

log = logging.getLogger(__name__)

# Validations of a run, evenly; one more stands before the first step.
VALIDATIONS = 5
# Validations in a row without a better one, after which a run ends.
PATIENCE = 3
# A validation loss of so many times the first one is taken for divergence.
DIVERGED = 1.5
# Steps between two searches for the scales of packed factors; a search takes as long as a step's tenth on SmolLM2.
SCALES_EVERY = 16

# After a state is written, no other is for so many times as long as that took, so that keeping it costs at most 2 %.
SPACING = 50

# Called with (steps done, steps in all, what to say about them).
Report = Callable[[int, int, str], None]


class Training:
    """Trains a student's factors on windows of tokens.

    Args:
        student: the quantised model.
        teacher: the full-precision model's outputs of the windows that this process works on (`shared.Dealt.taught`).
        ids: windows × tokens.
        settings: what was asked.
        state: file of the state that an interrupted run goes on from; None keeps none.
        interrupted: tells whether the run is asked to end.
        report: hears of every step.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        ids: torch.Tensor,
        settings: RefineSettings,
        *,
        state: Path | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        report: Report = lambda done, total, note: None,
    ) -> None:
        assert settings.learning_rate is not None
        self._student, self._rate = student, settings.learning_rate
        self._interrupted, self._report = interrupted, report
        self._factors: TrainedFactors = student.factors
        self._muon = Muon(self._factors)
        self._group = current()
        self._evaluation = Evaluation(student, teacher, ids, settings.loss, settings.seed, settings.passes)
        self._progress = Progress(state, self._factors, self._muon)
        self.outcome = Outcome(planned=len(self._evaluation.training))

    def run(self) -> Outcome:
        """Train until all windows were used as often as was asked, or something ends it."""
        begun = time.perf_counter()
        outcome = self.outcome
        spent = 0.0
        if self._progress.read(outcome):
            log.info("EoRA: refinement goes on after %d of %d steps.", outcome.steps, outcome.planned)
            spent = outcome.seconds
        else:
            self._factors.choose_scales()
            outcome.before = outcome.after = self._evaluation.validate()
            outcome.validations.append((0, outcome.before))
        outcome.ended = COMPLETE
        last = outcome.after
        every = max(1, outcome.planned // VALIDATIONS)
        next_write = 0.0
        while outcome.steps < outcome.planned:
            if self._stops():
                outcome.ended = INTERRUPTED
                break
            value = self._step(outcome.steps)
            if not math.isfinite(value):
                outcome.ended = NOT_FINITE
                break
            outcome.steps += 1
            left = outcome.planned - outcome.steps
            looked = not left or (outcome.steps % every == 0 and left >= every)
            if looked:
                last = self._look()
                if outcome.ended != COMPLETE:
                    break
            now = time.perf_counter()
            # Clocks of several processes differ, so that these write after validations alone.
            if looked or (self._group is None and now >= next_write):
                outcome.seconds = spent + now - begun
                by_first(partial(self._progress.write, outcome))
                next_write = time.perf_counter() + SPACING * (time.perf_counter() - now)
            note = f"loss {value:.3f}, validation {last:.3f}, {outcome.before:.3f} at the start"
            self._report(outcome.steps, outcome.planned, note)
        outcome.seconds = spent + time.perf_counter() - begun
        if outcome.ended in RESUMABLE:
            by_first(partial(self._progress.write, outcome))
        return outcome

    def _stops(self) -> bool:
        """Whether the run is asked to end, here or in another of several processes."""
        stops = self._interrupted()
        return stops if self._group is None else any(self._group.gather(stops))

    def _look(self) -> float:
        """Validate, keep the state if it is the best, and tell by `Outcome.ended` whether to end."""
        outcome = self.outcome
        found = self._evaluation.validate()
        outcome.validations.append((outcome.steps, found))
        if found < outcome.after:
            outcome.after, outcome.best, outcome.best_step = found, self._factors.stored(), outcome.steps
        log.info("EoRA: %d of %d steps, validation loss %.4f; %.4f at the start.",
                 outcome.steps, outcome.planned, found, outcome.before)  # fmt: skip
        if not math.isfinite(found):
            outcome.ended = NOT_FINITE
        elif found > DIVERGED * outcome.before:
            outcome.ended = DIVERGENCE
        elif outcome.stale >= PATIENCE:
            outcome.ended = STALE
        return found

    def _step(self, step: int) -> float:
        """A window in each process forward and back, and one step. Returns the mean loss of the windows."""
        if step % SCALES_EVERY == 0:
            self._factors.choose_scales()
        # From the first step on: rounding at the end alone gives 40 % of what was won back (SmolLM2, 4-bit factors).
        self._factors.use_rounded()
        window = self._evaluation.training[step]
        found = None if window is None else self._window(window)
        value = found if found is not None else 0.0
        if self._group is not None:
            self._group.at(f"refining, step {step + 1} of {self.outcome.planned}")
            value = averaged(self._group, self._factors.gradient, found)
        if math.isfinite(value):
            self._muon.step(rate_of(self._rate, step, self.outcome.planned))
        return value

    def _window(self, window: int) -> float:
        """A window forward and back, unless its loss is not finite. Returns the loss."""
        with torch.enable_grad():
            hidden = self._student.hidden(self._evaluation.ids(window))
        value, gradient = self._evaluation.loss(window, hidden)
        if math.isfinite(value):
            hidden.backward(gradient)
        return value
