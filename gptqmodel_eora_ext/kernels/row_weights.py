"""Weights of an ensemble's members, row by row, and how a model's kernels come by those of the call under way.

A forward of a model has sequences × tokens rows, and a weight for each sequence and member. Kernels see rows alone,
sequence after sequence, so that each sequence's weights are repeated for its tokens.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

# Numbers of rows whose weights are kept ready: a prompt's and a token's, and those of the prompt before.
MOST_KEPT = 4
CPU = torch.device("cpu")


def member_of(*members: Sequence[int]) -> torch.Tensor:
    """The member of each component of one adapter, or of several that are stacked: int32.

    Args:
        members: of each adapter, the number of components of each member.
    """
    each = (torch.arange(len(one), dtype=torch.int32).repeat_interleave(torch.tensor(one)) for one in members)
    return torch.cat(list(each))


class RowWeights:
    """Weights of the members for the sequences of one call.

    Args:
        weights: sequences × members, float32, on the CPU; not written to afterwards.

    Attributes:
        live: the members that some sequence gives a weight to.

    Example:
        >>> RowWeights(torch.tensor([[1.0, 0.0], [1.0, 0.5]])).for_rows(4)
        tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.5], [1.0, 0.5]])
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights
        self.live = tuple((weights != 0).any(dim=0).nonzero().flatten().tolist())
        self._kept: dict[int | tuple[int, torch.device], torch.Tensor] = {}

    def for_rows(self, rows: int, device: torch.device = CPU) -> torch.Tensor:
        """Weights of so many rows: rows × members, float32, contiguous.

        Raises:
            ValueError: when the rows cannot be those of these sequences.
        """
        # A call on the CPU takes 12 µs in a small layer: to hash the device, a hundredth of that.
        key = rows if device is CPU else (rows, device)
        found = self._kept.get(key)
        if found is None:
            sequences = len(self.weights)
            if rows % sequences:
                raise ValueError(
                    f"EoRA: an ensemble has weights for {sequences} sequences, and a module of it was called with "
                    f"{rows} rows, which are no whole number of tokens for each. Give weights for as many sequences as "
                    f"the batch has."
                )
            # A tensor of inference mode could not be saved for a gradient later.
            with torch.inference_mode(False):
                found = self.weights.repeat_interleave(rows // sequences, dim=0).contiguous().to(device)
            if len(self._kept) >= MOST_KEPT:
                # Several threads may use the same weights: another may have let go of them.
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[key] = found
        return found


class _OfThread(threading.local):
    """What one thread's calls are weighed by."""

    now: RowWeights | None = None


class Mixture:
    """What all adapters of one ensemble share: the weights of the call under way, in each thread its own.

    Args:
        members: names, the shared adapter first.

    Attributes:
        shared_alone: the weights of calls for which none were chosen.
    """

    def __init__(self, members: tuple[str, ...]) -> None:
        self.members = members
        self.shared_alone = RowWeights(torch.tensor([[1.0] + [0.0] * (len(members) - 1)]))
        self._mine = _OfThread()

    @property
    def now(self) -> RowWeights:
        """The weights that kernels use."""
        return self._mine.now or self.shared_alone

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model has weights of its own."""
        return Mixture, (self.members,)

    def set(self, weights: RowWeights | None) -> None:
        """Weigh what this thread computes from now on so; None for the shared adapter alone."""
        self._mine.now = weights

    @contextlib.contextmanager
    def weighed(self, weights: RowWeights | None) -> Iterator[None]:
        """Weigh what this thread computes within the block so; afterwards as before."""
        before = self._mine.now
        self._mine.now = weights
        try:
            yield
        finally:
            self._mine.now = before
