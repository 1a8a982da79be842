"""Measurements of gradients that outlive their process: each step is kept in the user's cache until all are done."""

from __future__ import annotations

import logging

import torch

from ..system.kept import Kept
from .sensitivity import SensitivityWriter

log = logging.getLogger(__name__)

NEXT = "next"


class StepsKept:
    """Keeps the steps of a measurement: `plan.gradients.GradientKeeper`.

    On disk are the inputs of the layers that are still to be gone back through, tokens × width each, and what the last
    step has handed down.

    Args:
        kept: where.
        writer: of what is found, which knows the files that are written.
    """

    def __init__(self, kept: Kept, writer: SensitivityWriter) -> None:
        self._kept, self._writer = kept, writer

    def go_on(self, count: int) -> tuple[int, list[torch.Tensor]]:
        """See `GradientKeeper`."""
        if NEXT not in self._kept:
            return 0, []
        state = self._kept.read(NEXT)
        self._writer.files.update(state["files"])
        log.info("EoRA: %d of %d steps were finished before the run was interrupted.", state["steps"], 2 * count)
        return state["steps"], state["gradients"]

    def inputs(self, index: int) -> list[torch.Tensor]:
        """See `GradientKeeper`."""
        found: list[torch.Tensor] = self._kept.read(_entering(index))
        return found

    def forward(self, index: int, outputs: list[torch.Tensor]) -> None:
        """See `GradientKeeper`."""
        self._kept.keep(_entering(index + 1), outputs)
        self._keep(index + 1, [])

    def backward(self, index: int, gradients: list[torch.Tensor], count: int) -> None:
        """See `GradientKeeper`."""
        self._keep(2 * count - index, gradients)
        # Of the last layer's output only the gradient is wanted now, and then of each layer's.
        self._kept.drop(_entering(index + 1))

    def _keep(self, steps: int, gradients: list[torch.Tensor]) -> None:
        self._kept.keep(NEXT, {"steps": steps, "gradients": gradients, "files": self._writer.files})
        self._kept.step_done()


def _entering(index: int) -> str:
    return f"entering-{index:05d}"
