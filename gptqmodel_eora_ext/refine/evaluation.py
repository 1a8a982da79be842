"""What a student loses on windows of tokens, beside the full-precision model's outputs of them."""

from __future__ import annotations

import torch

from ..system.distributed import current
from .losses import window_loss
from .shared import dealt
from .student import Student
from .teacher import Teacher


class Evaluation:
    """Splits windows into those that teach and those that validate, and computes losses on both.

    Args:
        student: the quantised model.
        teacher: the full-precision model's outputs of the windows that this process works on (`shared.Dealt.taught`).
        ids: windows × tokens.
        loss: of `losses.LOSSES`.
        seed: of the order of the windows.
        passes: how many times each window that trains is used.

    Attributes:
        training: of each step the number of the window that teaches; None where several processes share the windows
            out, and this one has none left.
    """

    def __init__(
        self, student: Student, teacher: Teacher, ids: torch.Tensor, loss: str, seed: int, passes: int = 1
    ) -> None:
        self._student, self._teacher, self._ids, self._name = student, teacher, ids, loss
        self._group = current()
        self._dealt = dealt(len(ids), seed, passes)
        self._places = {window: place for place, window in enumerate(self._dealt.taught)}
        self.training = self._dealt.training

    def ids(self, window: int) -> torch.Tensor:
        """A window's tokens, on the student's device."""
        return self._ids[window].to(self._student.device)

    def loss(
        self, window: int, hidden: torch.Tensor, *, with_gradient: bool = True
    ) -> tuple[float, torch.Tensor | None]:
        """The loss of a window, and its gradient at ``hidden``, or None where it is not wanted.

        Args:
            window: its number.
            hidden: the student's outputs of the last layer, tokens × width.
            with_gradient: whether the gradient is wanted.
        """
        with self._student.head() as head:
            return window_loss(
                self._name,
                head,
                hidden.detach(),
                self._teacher.hidden(self._places[window]).to(hidden.device),
                self.ids(window),
                self._student.vocabulary,
                with_gradient=with_gradient,
            )

    def validate(self) -> float:
        """The mean loss of the windows that validate, with the factors as they would be stored."""
        self._student.factors.use_rounded()
        total = 0.0
        with torch.no_grad():
            for window in self._dealt.validating:
                total += self.loss(window, self._student.hidden(self.ids(window)), with_gradient=False)[0]
        if self._group is not None:
            total = sum(self._group.gather(total))
        return total / self._dealt.held
