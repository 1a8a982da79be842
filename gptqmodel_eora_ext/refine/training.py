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
from .adam import Adam, cosine_rate
from .factors import TrainedFactors
from .losses import window_loss
from .outcome import COMPLETE, DIVERGENCE, INTERRUPTED, NOT_FINITE, RESUMABLE, STALE, Outcome
from .progress import Progress
from .settings import RefineSettings
from .shared import averaged, dealt
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
        self._student, self._teacher, self._ids = student, teacher, ids
        self._settings, self._interrupted, self._report = settings, interrupted, report
        self._factors: TrainedFactors = student.factors
        self._adam = Adam(self._factors)
        self._group = current()
        self._dealt = dealt(len(ids), settings.seed)
        self._places = {window: place for place, window in enumerate(self._dealt.taught)}
        self._progress = Progress(state, self._factors, self._adam)
        self.outcome = Outcome(planned=len(self._dealt.training))

    def run(self) -> Outcome:
        """Train until all windows were used once, or something ends it."""
        begun = time.perf_counter()
        outcome = self.outcome
        spent = 0.0
        if self._progress.read(outcome):
            log.info("EoRA: refinement goes on after %d of %d steps.", outcome.steps, outcome.planned)
            spent = outcome.seconds
        else:
            self._factors.choose_scales()
            outcome.before = outcome.after = self._validate()
            outcome.validations.append((0, outcome.before))
        outcome.ended = COMPLETE
        last = outcome.after
        every = max(1, outcome.planned // VALIDATIONS)
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
            if not left or (outcome.steps % every == 0 and left >= every):
                last = self._look()
                if outcome.ended != COMPLETE:
                    break
                outcome.seconds = spent + time.perf_counter() - begun
                by_first(partial(self._progress.write, outcome))
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
        found = self._validate()
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
        """A window in each process forward and back, and one step of Adam. Returns the mean loss of the windows."""
        if step % SCALES_EVERY == 0:
            self._factors.choose_scales()
        # From the first step on: rounding at the end alone gives 40 % of what was won back (SmolLM2, 4-bit factors).
        self._factors.use_rounded()
        window = self._dealt.training[step]
        found = None if window is None else self._window(window)
        value = found if found is not None else 0.0
        if self._group is not None:
            self._group.at(f"refining, step {step + 1} of {self.outcome.planned}")
            value = averaged(self._group, self._factors.gradient, found)
        if math.isfinite(value):
            self._adam.step(cosine_rate(self._settings.learning_rate, step, self.outcome.planned))
        return value

    def _window(self, window: int) -> float:
        """A window forward and back, unless its loss is not finite. Returns the loss."""
        ids = self._ids[window].to(self._student.device)
        with torch.enable_grad():
            hidden = self._student.hidden(ids)
        value, gradient = self._loss(window, ids, hidden, with_gradient=True)
        if math.isfinite(value):
            hidden.backward(gradient)
        return value

    def _validate(self) -> float:
        """The mean loss of the windows that validate, with the factors as they would be stored."""
        self._factors.use_rounded()
        total = 0.0
        with torch.no_grad():
            for window in self._dealt.validating:
                ids = self._ids[window].to(self._student.device)
                total += self._loss(window, ids, self._student.hidden(ids), with_gradient=False)[0]
        if self._group is not None:
            total = sum(self._group.gather(total))
        return total / self._dealt.held

    def _loss(
        self, window: int, ids: torch.Tensor, hidden: torch.Tensor, *, with_gradient: bool
    ) -> tuple[float, torch.Tensor | None]:
        with self._student.head() as head:
            return window_loss(
                self._settings.loss,
                head,
                hidden.detach(),
                self._teacher.hidden(self._places[window]).to(hidden.device),
                ids,
                self._student.vocabulary,
                with_gradient=with_gradient,
            )
