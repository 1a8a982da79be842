"""Stand-ins for the `forward` of parts of a layer whose results cannot change any more: each batch is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# For a layer, over all batches, at most so many bytes are kept of the inputs of blocks' last modules, and as many of
# the inputs and outputs of norms.
KEPT_BYTES = 1 << 30


class ReusedBlock:
    """Stands in for the `forward` of a block that is finished, from now until `release`: computes each batch once.

    It keeps the block's output for every batch, on the device that it was computed on, and returns copies. Where the
    output turns out to be that of the block's last module, only that module is computed, from inputs known beforehand.

    Args:
        block: neither its weights nor its input for a batch may change any more.
        current_batch: tells the number of the batch under way; None for one that is not known, which is computed anew.
        last: the module of the block that comes last, if known.
        inputs: batch → input of ``last``; an input is taken out once it is used.
    """

    def __init__(
        self,
        block: torch.nn.Module,
        current_batch: Callable[[], int | None],
        last: torch.nn.Module | None = None,
        inputs: dict[int, torch.Tensor] | None = None,
    ) -> None:
        self._block = block
        self._forward = block.forward
        # A library that dispatches modules may have put a `forward` of its own on the instance.
        self._own = vars(block).get("forward")
        self._last = last
        self._inputs = {} if inputs is None else inputs
        self._current_batch = current_batch
        self._outputs: dict[int, Any] = {}
        # Whether the block's output is that of its last module; found out on the first batch.
        self._ends_with_last: bool | None = None
        # What a block that returns a tuple returns beside the output: None, once or several times.
        self._rest: list[None] | None = None
        block.forward = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._current_batch()
        if batch is None:
            return self._forward(*args, **kwargs)
        if batch not in self._outputs:
            self._outputs[batch] = self._compute(batch, args, kwargs)
        # A copy, since a layer may add its residual in place.
        return _copied(self._outputs[batch])

    def _compute(self, batch: int, args: Any, kwargs: Any) -> Any:
        rows = self._inputs.pop(batch, None)
        if rows is None or self._last is None or self._ends_with_last is False:
            return self._forward(*args, **kwargs)
        found = self._last(rows)
        if self._ends_with_last:
            return found if self._rest is None else (found, *self._rest)
        output = self._forward(*args, **kwargs)
        first, *rest = output if isinstance(output, tuple) else (output,)
        self._rest = rest if isinstance(output, tuple) else None
        self._ends_with_last = all(one is None for one in rest) and torch.equal(first, found)
        return output

    def release(self) -> None:
        """Give the block its own `forward` back."""
        del self._block.forward
        if self._own is not None:
            self._block.forward = self._own
        self._outputs.clear()
        self._inputs.clear()


class RememberedBlock:
    """Stands in for the `forward` of a block whose weights do not change (a norm), from now until `release`.

    Where the block's input for a batch is what it was before, it returns a copy of the output that it gave then. Blocks
    of one tensor in and one tensor out are served; other calls are computed as ever.

    Args:
        block: the block.
        current_batch: tells the number of the batch under way; None for one that is not known.
        budget: one number, the bytes that all such blocks of a layer together may still keep; each counts it down.
    """

    def __init__(self, block: torch.nn.Module, current_batch: Callable[[], int | None], budget: list[int]) -> None:
        self._block = block
        self._forward = block.forward
        self._current_batch = current_batch
        self._budget = budget
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        block.forward = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._current_batch()
        if batch is None or kwargs or len(args) != 1 or not isinstance(args[0], torch.Tensor):
            return self._forward(*args, **kwargs)
        known = self._known.get(batch)
        if known is not None and torch.equal(known[0], args[0]):
            return known[1].clone()
        output = self._forward(*args)
        if known is None and isinstance(output, torch.Tensor) and self._budget[0] >= args[0].nbytes + output.nbytes:
            self._budget[0] -= args[0].nbytes + output.nbytes
            # Copies, since a layer may change either tensor in place later.
            self._known[batch] = args[0].clone(), output.clone()
        return output

    def release(self) -> None:
        """Give the block its own `forward` back."""
        del self._block.forward
        self._known.clear()


def _copied(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.clone()
    return type(output)(map(_copied, output)) if type(output) in (tuple, list) else output
