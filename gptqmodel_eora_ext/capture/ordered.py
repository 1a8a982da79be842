"""Second moments over several processes, added up in the order in which one process adds them up.

A sum of floats depends on its order. GPTQ rounds each weight up or down by such a sum, so its last bit decides some
weights, and those decide others. Sums that each process makes by itself, added together at the end, would make other
weights with every number of processes. So the sums are passed on: the first process adds the products of its windows,
in their order, and hands the sum to the second, which goes on adding. To keep all of them busy a sum is cut into panels
of columns: while the second process adds its windows to the first panel, the first is at the next one. The last process
holds the whole sum and sends it to those that need it.

With N processes and P panels this takes (P + N − 1) / (P N) of the time of one process, and each process sends a sum
once, as in a ring. Every process keeps the rows that its windows' modules read until they are added.

The result has the bits of one process as long as a product of some columns has the bits of those columns of the whole
product. So it was found on CPUs (MKL 2024) for panels of `LEAST_PANEL` columns and more, with one thread and two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from ..system.group import Group
from .output_error import OutputErrorMoment
from .second_moment import DiagonalMoment, SecondMoment, block_columns, kept_inputs

# Each process has some panels to work on for each that it waits for at the beginning and the end.
PANELS_A_PROCESS = 4
# Narrower panels leave a matrix product too little to do for each row that it reads.
LEAST_PANEL = 64

# Adds the products of this process's windows to a panel: rows of the sum from `first` on, some of its columns.
AddPanel = Callable[[torch.Tensor, int, slice], None]


def panels_of(features: int, size: int, blocks: Sequence[slice] | None = None) -> list[tuple[int, slice]]:
    """The panels that a sum of features × features is cut into.

    Args:
        features: width of the sum.
        size: number of processes.
        blocks: block columns of which only the part from the diagonal down is summed; by default the whole is.

    Returns:
        First row and columns of each panel.
    """
    wanted = PANELS_A_PROCESS * size
    panels: list[tuple[int, slice]] = []
    for block in blocks or [slice(0, features)]:
        columns = block.stop - block.start
        count = max(1, min(-(-wanted * columns // features), columns // LEAST_PANEL))
        width = -(-columns // count)
        first = block.start if blocks else 0
        panels += [
            (first, slice(start, min(start + width, block.stop))) for start in range(block.start, block.stop, width)
        ]
    return panels


def chained(
    group: Group, features: int, panels: Sequence[tuple[int, slice]], add: AddPanel, targets: Collection[int]
) -> torch.Tensor | None:
    """Pass a sum from process to process, each adding its part, and give it to those that need it.

    Args:
        group: the processes, which all call this alike.
        features: the sum is features × features, float32.
        panels: of `panels_of`.
        add: adds what this process has to a panel.
        targets: ranks that need the sum.

    Returns:
        The sum on the group's device in the processes of ``targets``, else None. What no panel holds is zero.
    """
    rank, last = group.rank, group.size - 1
    total = torch.zeros(features, features, device=group.device)
    for first, columns in panels:
        # A part of the whole sum, as where one process adds: products of few columns depend on how the sum lies.
        panel = total[first:, columns]
        if rank > 0:
            panel.copy_(group.receive(torch.empty(panel.shape, device=group.device), rank - 1))
        add(panel, first, columns)
        for to in [rank + 1] if rank < last else [one for one in targets if one != last]:
            group.send(panel.contiguous(), to)
    if rank != last and rank in targets:
        for first, columns in panels:
            panel = total[first:, columns]
            panel.copy_(group.receive(torch.empty(panel.shape, device=group.device), last))
    group.finish_sending()
    return total if rank in targets else None


def chained_vector(group: Group, parts: Sequence[torch.Tensor], features: int) -> torch.Tensor:
    """The sum of vectors of all processes in the order of one, on the group's device; every process has it.

    Args:
        group: the processes.
        parts: this process's, in order, float32.
        features: length of each.
    """
    total = torch.zeros(features, device=group.device)
    if group.rank > 0:
        group.receive(total, group.rank - 1)
    for part in parts:
        total.add_(part.to(total.device))
    if group.rank < group.size - 1:
        group.send(total, group.rank + 1)
        group.finish_sending()
    return group.broadcast(total.clone(), group.size - 1)


class OrderedMoment(SecondMoment):
    """A `SecondMoment` over all windows of all processes: rows are kept as they come, and added by `merge`."""

    def __init__(self, in_features: int, name: str) -> None:
        super().__init__(in_features, name)
        self._rows: list[torch.Tensor] = []

    def add(self, inputs: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Keep a batch, in its own dtype, on the CPU: see `SecondMoment.add`."""
        rows = kept_inputs(inputs, keep, self.in_features, self.name)
        if len(rows):
            self._rows.append(rows.to("cpu", copy=True))
            self.tokens += len(rows)

    def merge(self, group: Group, targets: Collection[int]) -> None:
        """Add up what all processes have kept; the sum is there in those of ``targets``, the count in all."""

        def add(panel: torch.Tensor, first: int, columns: slice) -> None:
            for rows in self._rows:
                wide = rows.to(device=panel.device, dtype=torch.float32)
                panel.addmm_(wide[:, first:].T, wide[:, columns])

        panels = panels_of(self.in_features, group.size, list(block_columns(self.in_features)))
        total = chained(group, self.in_features, panels, add, targets)
        self._rows.clear()
        self.tokens = sum(group.gather(self.tokens))
        self._sums = {} if total is None else {total.device: total}


class OrderedDiagonal(DiagonalMoment):
    """A `DiagonalMoment` over all windows of all processes: each batch's energies are kept, and added by `merge`."""

    def __init__(self, in_features: int, name: str) -> None:
        super().__init__(in_features, name)
        self._parts: list[torch.Tensor] = []

    def add(self, inputs: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        super().add(inputs, keep)
        self._parts += self._sums.values()
        self._sums = {}

    def merge(self, group: Group) -> None:
        """Add up what all processes have kept, in all of them."""
        total = chained_vector(group, self._parts, self.in_features)
        self._parts.clear()
        self.tokens = sum(group.gather(self.tokens))
        self._sums = {total.device: total}


class OrderedOutputError(OutputErrorMoment):
    """An `OutputErrorMoment` over all windows of all processes.

    Args:
        fresh: the moment that one process would sum, still empty.
    """

    def __init__(self, fresh: OutputErrorMoment) -> None:
        vars(self).update(vars(fresh))
        self._errors = self._ordered = OrderedMoment(len(fresh.weight), fresh.name)
        self._energies = self._diagonal = OrderedDiagonal(fresh.weight.shape[1], fresh.name)
        self._signals: list[float] = []

    def add(self, inputs: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        super().add(inputs, keep)
        self._signals.append(self._signal)
        self._signal = 0.0

    def merge(self, group: Group, targets: Collection[int]) -> None:
        """Add up what all processes have kept; the sum is there in those of ``targets``."""
        self._ordered.merge(group, targets)
        self._diagonal.merge(group)
        told = group.gather([self._signals, self._signal_tokens])
        # One after the other: `sum` compensates rounding from Python 3.12 on, which `add` does not.
        for signal in (one for signals, _ in told for one in signals):
            self._signal += signal
        self._signal_tokens = sum(tokens for _, tokens in told)
        self._signals.clear()
