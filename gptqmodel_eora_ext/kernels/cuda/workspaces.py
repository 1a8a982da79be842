"""Where launches go, and the memory that they count in: launches that may run at once share none of it."""

from __future__ import annotations

import torch

# In place of a stream's number: all that are being captured.
CAPTURED = -1
# torch.cuda's own functions make an object at each call, which takes as long as the launch.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def stream_of(index: int) -> int:
    """The number of a device's current stream; 0 for the CPU (index −1), where tests run the kernels."""
    if index < 0:
        return 0
    return _raw_stream(index) if _raw_stream is not None else torch.cuda.current_stream(index).cuda_stream


def place_of(index: int) -> tuple[int, int]:
    """Whose workspace a launch on a device takes now, and the device's current stream. Whoever captures a stream may
    replay the graph on another."""
    stream = stream_of(index)
    return (CAPTURED if index >= 0 and torch.cuda.is_current_stream_capturing() else stream), stream


class Workspaces:
    """A workspace for each stream and one for graphs, zero at first; kernels leave their counters at zero.

    Do not replay two graphs that hold the same module at the same time.

    Args:
        numbers: 32-bit numbers of each.
    """

    def __init__(self, numbers: int) -> None:
        self._numbers = numbers
        self._made: dict[int, torch.Tensor] = {}

    def at(self, place: int, device: torch.device) -> torch.Tensor | None:
        """The workspace of a stream, or of graphs for `CAPTURED`: int32.

        None for the latter where no stream has one yet: counters made while a graph is captured would hold anything
        until it is replayed.
        """
        found = self._made.get(place)
        if found is None and place != CAPTURED:
            for one in (CAPTURED, place):
                found = self._made.setdefault(one, torch.zeros(self._numbers, dtype=torch.int32, device=device))
        return found
