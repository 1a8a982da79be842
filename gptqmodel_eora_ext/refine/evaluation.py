"""What a student loses on windows of tokens, beside the full-precision model's outputs of them."""

from __future__ import annotations

import torch

from .losses import window_loss
from .settings import validated
from .student import Student
from .teacher import Teacher


class Evaluation:
    """Splits windows into those that teach and those that validate, and computes losses on both.

    Args:
        student: the quantised model.
        teacher: the full-precision model's outputs of the same windows.
        ids: windows × tokens.
        loss: of `losses.LOSSES`.
        seed: of the order of the windows.

    Attributes:
        training: numbers of the windows that teach, in the order in which they are used.
        validating: numbers of the others.
    """

    def __init__(self, student: Student, teacher: Teacher, ids: torch.Tensor, loss: str, seed: int) -> None:
        self._student, self._teacher, self._ids, self._name = student, teacher, ids, loss
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).tolist()
        held = validated(len(ids))
        self.validating, self.training = sorted(order[:held]), order[held:]

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
                self._name, head, hidden.detach(), self._teacher.hidden(window).to(hidden.device), self.ids(window),
                self._student.vocabulary, with_gradient=with_gradient,
            )  # fmt: skip

    def validate(self) -> float:
        """The mean loss of the windows that validate, with the factors as they would be stored."""
        self._student.factors.use_rounded()
        total = 0.0
        with torch.no_grad():
            for window in self.validating:
                total += self.loss(window, self._student.hidden(self.ids(window)), with_gradient=False)[0]
        return total / len(self.validating)
