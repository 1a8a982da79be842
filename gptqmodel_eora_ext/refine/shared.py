"""Which windows a process trains and validates on, and how several processes make one step of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..system.distributed import current, share
from ..system.group import Group
from .settings import validated


@dataclass(frozen=True)
class Dealt:
    """The windows of one process.

    Attributes:
        training: of each step the window; None where this process has none left and only takes part in the step.
        validating: windows that this process validates on.
        held: windows that all processes together validate on.
    """

    training: list[int | None]
    validating: list[int]
    held: int

    @property
    def taught(self) -> list[int]:
        """Windows of which this process needs what the full-precision model computes, ascending."""
        return sorted({one for one in self.training if one is not None} | set(self.validating))


def dealt(windows: int, seed: int, passes: int = 1) -> Dealt:
    """Deal windows out. A step of one process takes one window, a step of N processes takes N.

    Args:
        windows: number of windows.
        seed: of their order.
        passes: how many times each window that trains is used, each time in another order.

    Raises:
        ValueError: for fewer windows to train on than processes.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(windows, generator=generator).tolist()
    held = validated(windows)
    validating, training = sorted(order[:held]), order[held:]
    group = current()
    if group is None:
        return Dealt(_repeated(training, passes, generator), validating, held)
    if len(training) < group.size:
        raise ValueError(
            f"EoRA: {len(training)} windows to train on cannot be shared out between {group.size} processes: each "
            f"needs one. Pass more text, a smaller window, or start fewer processes."
        )
    steps = -(-len(training) // group.size)
    padded = training + [None] * (steps * group.size - len(training))
    some = share(len(validating), group.size, group.rank)
    mine = _repeated(padded[group.rank :: group.size], passes, generator)
    return Dealt(mine, validating[some.start : some.stop], held)


def _repeated(once: Sequence[int | None], passes: int, generator: torch.Generator) -> list[int | None]:
    """The windows of a pass, and after them those of further passes. A process keeps its own, in an order that all
    processes share: what the full-precision model computes of them is enough, and none is left without one early."""
    found = list(once)
    for _ in range(passes - 1):
        found += [once[place] for place in torch.randperm(len(once), generator=generator).tolist()]
    return found


def averaged(group: Group, gradient: torch.Tensor, value: float | None) -> float:
    """Replace a gradient by its mean over the processes that have one, summed in float32; returns their mean loss.

    Args:
        group: the processes.
        gradient: of this process's window; zeros where it has none.
        value: the window's loss; None where this process has none.
    """
    values = [one for one in group.gather(value) if one is not None]
    wide = gradient.to(torch.float32)
    group.add_up(wide)
    gradient.copy_(wide.div_(len(values)))
    return sum(values) / len(values)
