"""One natural-gradient step of all modules together, in place of a training loop: the loss "natural".

Of every module are gathered, over the windows that teach,

    ∇ = E[g xᵀ]    g the gradient of the divergence ("kl") at its output, x its input
    C = E[x xᵀ]
    G = E[h hᵀ]    h the gradient of the cross entropy of labels drawn from the model's own scores

The Fisher information of the weight is near G ⊗ C (K-FAC, arXiv 1503.05671), so its natural gradient is G⁻¹ ∇ C⁻¹, with
both moments damped. T = B A − η G⁻¹ ∇ C⁻¹ is cut back to the rank by the least ‖G^½ (T − B A) C^½‖, which is EoRA's
problem weighed on both sides; this is the second stage of "Align, Then Correct" (arXiv 2610.08164), with the divergence
from the full-precision model in place of the text's cross entropy. All modules step at once, each as if the others
stood still, so η is below 1; the windows that validate choose it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from ..formats.factors import PACKED_BITS, PACKED_LAYOUT, FactorLayout
from ..plan.gradients import gradients_of_outputs
from ..plan.rows import InputRows, OutputGradients
from ..plan.survey import memory_limit
from ..solve import balance, eora, quantize_factors, refit_B
from ..solve.factors import balance_together
from ..solve.quantized import stored_B
from ..system.memory import release_free_memory
from ..system.spill import spilling
from .evaluation import Evaluation
from .factors import TrainedFactors
from .outcome import COMPLETE, INTERRUPTED, NOT_FINITE, Outcome
from .student import Student

log = logging.getLogger(__name__)

# η. Each costs a solve of every module and a validation. On a tiny model of random weights 0.1 was too long already,
# since all modules mend the same error at once; no real model was measured.
STEPS = (0.01, 0.03, 0.06, 0.1, 0.2)
# Of a moment's mean diagonal, added to its diagonal: what calibration saw little of would be stepped along without end.
DAMPING = 0.1

# A (rank × in) and Bᵀ (rank × out), float32.
Pair = tuple[torch.Tensor, torch.Tensor]


class NaturalStep:
    """Replaces a student's factors by what one natural-gradient step makes of them.

    In memory beside the packed weights and the factors: for each of `STEPS` all factors in float32; the inputs of
    layers of all windows, on disk beyond `EORA_SURVEY_MEMORY`; one layer's activations, and of its modules the moments,
    out × out and in × in float32, and the gradient, out × in.

    Args:
        student: the quantised model.
        evaluation: its windows, with the loss "kl".
        seed: of the labels that are drawn.
        folder: for inputs of layers on disk.
        interrupted: tells whether the run is asked to end.
        report: hears of every layer on the way there and back, and of every validation.
    """

    def __init__(
        self,
        student: Student,
        evaluation: Evaluation,
        *,
        seed: int,
        folder: Path,
        interrupted: Callable[[], bool] = lambda: False,
        report: Callable[[int, int, str], None] = lambda done, total, note: None,
    ) -> None:
        self._student, self._evaluation, self._seed, self._folder = student, evaluation, seed, folder
        self._factors: TrainedFactors = student.factors
        self._numbers = [window for window in evaluation.training if window is not None]
        self._interrupted, self._report = interrupted, report
        self._done, self._total = 0, 2 * len(student.layered) + len(STEPS)
        self.outcome = Outcome(planned=len(STEPS))

    def run(self) -> Outcome:
        """Take the step; of `STEPS` the best on the windows that validate is kept, if it is better than the start."""
        begun = time.perf_counter()
        outcome = self.outcome
        self._factors.choose_scales()
        outcome.before = outcome.after = self._evaluation.validate()
        outcome.validations.append((0, outcome.before))
        outcome.ended = COMPLETE
        found = self._sweep()
        for step in found if outcome.ended == COMPLETE else ():
            if self._interrupted():
                outcome.ended = INTERRUPTED
                break
            self._try(step, found[step])
        outcome.seconds = time.perf_counter() - begun
        return outcome

    def _try(self, step: float, factors: Mapping[str, Pair]) -> None:
        outcome = self.outcome
        for name, pair in factors.items():
            self._factors.replace(name, *pair)
        self._factors.choose_scales()
        value = self._evaluation.validate()
        outcome.steps += 1
        outcome.validations.append((outcome.steps, value))
        if value < outcome.after:
            outcome.after, outcome.best, outcome.best_step = value, self._factors.stored(), outcome.steps
        log.info("EoRA: a natural-gradient step of %g: validation loss %.4f; %.4f at the start.",
                 step, value, outcome.before)  # fmt: skip
        self._tell(f"step {step:g}, validation {value:.3f}, {outcome.before:.3f} at the start")

    def _tell(self, note: str) -> None:
        self._done += 1
        self._report(self._done, self._total, note)

    def _sweep(self) -> dict[float, dict[str, Pair]]:
        """Of each step size the factors of all modules; `Outcome.ended` tells where it was cut short."""
        layered, numbers = self._student.layered, self._numbers
        found: dict[float, dict[str, Pair]] = {step: {} for step in STEPS}
        windows = layered.begin([{"input_ids": self._evaluation.ids(number)[None]} for number in numbers])
        with spilling(memory_limit(), self._folder) as spill:
            inputs = [[spill.keep(window.hidden)] for window in windows]
            for index in range(len(layered)):
                if self._stopped():
                    return found
                with layered.layer(index) as layer, torch.no_grad():
                    for window, kept in zip(windows, inputs, strict=True):
                        window.hidden = layered.run(layer, index, window.hidden, window)
                        if index < len(layered) - 1:
                            kept.append(spill.keep(window.hidden))
                self._tell("forward")
            by_loss = [self._by_loss(number, window.hidden[0]) for number, window in zip(numbers, windows, strict=True)]
            if self.outcome.ended != COMPLETE:
                return found
            by_labels = gradients_of_outputs(layered, windows, "fisher", torch.Generator().manual_seed(self._seed))
            for index in reversed(range(len(layered))):
                if self._stopped():
                    return found
                with layered.layer(index) as layer:
                    linears = {name: layered.model.get_submodule(name) for name in self._factors.modules()
                               if name.startswith(f"{layered.layers[index]}.")}  # fmt: skip
                    with (
                        InputRows(layered.layers[index], layer, linears) as reads,  # type: ignore[arg-type]
                        OutputGradients(layered.layers[index], layer, linears) as gives,  # type: ignore[arg-type]
                    ):
                        of_loss: dict[str, list[torch.Tensor]] = {}
                        of_labels: dict[str, list[torch.Tensor]] = {}
                        for place, window in enumerate(windows):
                            reads.begin(window.keep)
                            gives.keep = window.keep
                            given = inputs[place].pop()
                            hidden = spill.read(given, layered.device).detach().requires_grad_()
                            with torch.enable_grad():
                                output = layered.run(layer, index, hidden, window)
                            for rows, handed in ((of_loss, by_loss), (of_labels, by_labels)):
                                gives.gradients = rows
                                hidden.grad = None
                                output.backward(handed[place], retain_graph=rows is of_loss)
                                assert hidden.grad is not None
                                handed[place] = hidden.grad
                            spill.drop(given)
                    for name, step, pair in self._of_layer(reads, of_loss, of_labels):
                        found[step][name] = pair
                    del reads, gives, of_loss, of_labels
                release_free_memory()
                self._tell("back")
        # Autograd added the factors' own gradients up there, which nobody wants.
        self._factors.gradient.zero_()
        return found

    def _stopped(self) -> bool:
        if self._interrupted():
            self.outcome.ended = INTERRUPTED
        return self.outcome.ended != COMPLETE

    def _by_loss(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        value, gradient = self._evaluation.loss(number, hidden)
        if not math.isfinite(value):
            self.outcome.ended = NOT_FINITE
        assert gradient is not None
        return gradient[None]

    @torch.no_grad()
    def _of_layer(
        self, reads: InputRows, of_loss: Mapping[str, list[torch.Tensor]], of_labels: Mapping[str, list[torch.Tensor]]
    ) -> Iterator[tuple[str, float, Pair]]:
        """Module, step size and new factors, for the modules of a layer that tokens have reached."""
        windows = len(self._numbers)
        tokens = windows * self._evaluation.ids(0).numel()
        bits, layout = self._factors.bits, self._factors.layout
        for leader in dict.fromkeys(reads.leaders.values()):
            x = reads.rows(leader).to(torch.float32)
            inputs = damped(x.T @ x / tokens)
            lower = torch.linalg.cholesky(inputs)
            for name in (one for one, theirs in reads.leaders.items() if theirs == leader and one in of_loss):
                h = torch.cat(of_labels[name]).to(torch.float32)
                outputs = damped(h.T @ h / tokens)
                # The loss of a window is a mean over its tokens already.
                gradient = torch.cat(of_loss[name]).to(torch.float32).T @ x / windows
                natural = natural_gradient(gradient, torch.linalg.cholesky(outputs), lower)
                now = self._factors.of_master(name)
                for step in STEPS:
                    yield name, step, stepped(now, step * natural, inputs, outputs, bits, layout)


def damped(moment: torch.Tensor) -> torch.Tensor:
    """A second moment with `DAMPING` of its mean diagonal added to its diagonal."""
    level = float(moment.diagonal().mean()) * DAMPING
    # A module that nothing depends on has no gradient, and its moment is 0.
    return moment + torch.eye(len(moment), device=moment.device) * max(level, torch.finfo(moment.dtype).tiny)


def natural_gradient(gradient: torch.Tensor, lower_G: torch.Tensor, lower_C: torch.Tensor) -> torch.Tensor:
    """G⁻¹ ∇ C⁻¹, out × in.

    Args:
        gradient: ∇, out × in.
        lower_G: the lower Cholesky factor of G, out × out.
        lower_C: that of C, in × in.
    """
    return torch.cholesky_solve(torch.cholesky_solve(gradient, lower_G).T, lower_C).T


def stepped(
    now: Pair,
    change: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    bits: int,
    layout: FactorLayout = PACKED_LAYOUT,
) -> Pair:
    """The best factors for B A − change, of the rank that they have.

    Args:
        now: A (rank × in) and Bᵀ (rank × out).
        change: out × in.
        inputs: C, in × in.
        outputs: G, out × out.
        bits: of a stored value; for packed factors B is solved against the rounded A.
        layout: of the file that packed factors are for.

    Returns:
        A and Bᵀ, float32.
    """
    target = now[1].T @ now[0] - change
    lora_A, _ = eora(target, inputs, len(now[0]), output_moment=outputs)
    lora_B = refit_B(target, inputs, lora_A)
    scaled = balance_together if layout.along_rank else balance
    lora_A, lora_B = scaled(lora_A.to(torch.float64), lora_B)
    if bits in PACKED_BITS:
        down, up = quantize_factors(target, inputs, lora_A.to(torch.float32), bits, layout)
        return down.dequantize(), stored_B(up, layout).T
    return lora_A.to(torch.float32), lora_B.T.to(torch.float32)
