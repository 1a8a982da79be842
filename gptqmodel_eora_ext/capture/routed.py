"""Which rows of a module's input are padding, also where the module reads tokens that were routed to it.

Most modules of a layer read windows × tokens × width, or all tokens in order, and the attention mask tells which of
them are padding. An expert reads the tokens that a router sent to it, in an order of the architecture's own and without
a mask. But its rows are copies of rows that the block around the experts reads, of which it is known which are padding,
so that a row is recognised by a checksum of its bits. What an expert computes from its rows (the input of its
`down_proj`) stands in the same order.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

log = logging.getLogger(__name__)

# The integers that floats of so many bytes are looked at as.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Rows whose checksums are computed at a time, since each of their features is widened to 8 bytes for it.
CHECKSUM_ROWS = 1024


class RoutedRows:
    """Masks of the inputs of a layer's linear modules, while it is entered.

    Hooks on the blocks around experts, and on the experts' modules, watch what they read; nothing of the forward is
    changed. They do nothing in a batch without padding; with padding they take 8 bytes for each token and for each
    token's way through an expert. A padded token that has the bits of a real one counts as that. Each thread has its
    own batch.

    Args:
        layer: to watch; its own call begins a batch.
        keep: called at the beginning of a batch: its attention mask, windows × tokens, non-zero = a real token; None
            where all are real.
    """

    def __init__(self, layer: torch.nn.Module, keep: Callable[[], torch.Tensor | None]) -> None:
        self._layer = layer
        self._keep = keep
        self._handles = ExitStack()
        self._batch = _Batch()
        self._told = False

    def __enter__(self) -> RoutedRows:
        # Ours come first, so that other hooks of the same modules find what we have seen.
        on = self._handles.callback
        on(self._layer.register_forward_pre_hook(self._begin, prepend=True).remove)
        blocks = set()
        for path, module in self._layer.named_modules():
            number = _expert_number(path)
            if number is None or not isinstance(module, torch.nn.Linear):
                continue
            on(module.register_forward_pre_hook(self._expert_hook(path, number), prepend=True).remove)
            parts = path.split(".")
            last = max(place for place, part in enumerate(parts) if part.isdecimal())
            blocks |= {".".join(parts[:end]) for end in range(1, last + 1)}
        for block in blocks:
            module = self._layer.get_submodule(block)
            on(module.register_forward_pre_hook(self._block_hook, prepend=True, with_kwargs=True).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handles.close()
        self._batch = _Batch()

    def real(self, path: str, rows: torch.Tensor) -> torch.Tensor | None:
        """Which rows of a module's input in the batch under way are real tokens.

        Args:
            path: of the module in the layer.
            rows: its input, (…, features).

        Returns:
            bool, of the leading dimensions of ``rows`` and on their device; None where all of them count, which they
            do too where nothing is known of them.
        """
        keep, leading = self._batch.keep, rows.shape[:-1]
        if keep is None:
            return None
        if leading[: keep.ndim] == keep.shape:
            further = len(leading) - keep.ndim
            return keep.reshape(*keep.shape, *[1] * further).expand(leading).to(rows.device)
        found = self._batch.masks.get(path)
        if found is None and leading.numel() == keep.numel():
            found = keep
        if found is None or found.numel() != leading.numel():
            return None
        return found.reshape(leading).to(rows.device)

    def _begin(self, layer: torch.nn.Module, args: Any) -> None:
        keep = self._keep()
        keep = None if keep is None else keep.bool()
        self._batch.begin(None if keep is None or bool(keep.all()) else keep)

    def _block_hook(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Remember the rows that a block around experts reads, if they are those of all tokens in order."""
        batch = self._batch
        if batch.keep is None:
            return
        for one in (*args, *kwargs.values()):
            if isinstance(one, torch.Tensor) and one.is_floating_point() and one.ndim > 1:
                flat = one.reshape(-1, one.shape[-1])
                if len(flat) == batch.keep.numel():
                    batch.learn(checksums(flat))
                    return

    def _expert_hook(self, path: str, number: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            batch, rows = self._batch, args[0]
            if batch.keep is None or rows.shape[:-1] == batch.keep.shape:
                return
            flat = rows.reshape(-1, rows.shape[-1])
            mask = batch.recognised(checksums(flat))
            if mask is None:
                # Computed from the rows that the expert's module before it read.
                before = batch.experts.get(number)
                mask = before if before is not None and len(before) == len(flat) else None
            if mask is None and len(flat) == batch.keep.numel():
                # Every expert is given every token, weighted, as in Llama 4.
                mask = batch.keep.reshape(-1)
            if mask is None:
                self._tell(path)
                return
            batch.masks[path] = batch.experts[number] = mask

        return hook

    def _tell(self, path: str) -> None:
        if not self._told:
            self._told = True
            log.warning(
                "EoRA: %s of a %s reads rows that cannot be told apart from padding, so that padding counts among its "
                "experts' inputs. Use calibration windows of one length.", path, type(self._layer).__name__,
            )  # fmt: skip


class _Batch(threading.local):
    """What is known of the batch that is under way in a thread."""

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, keep: torch.Tensor | None) -> None:
        """Forget the batch before.

        Args:
            keep: windows × tokens, bool; None without padding.
        """
        self.keep = keep
        # Which rows of its input are real: of a module by its path, and of the last one by its expert's number.
        self.masks: dict[str, torch.Tensor] = {}
        self.experts: dict[str, torch.Tensor] = {}
        # Checksums of rows that blocks read: of all, and of padding alone.
        self._known = self._padding = torch.empty(0, dtype=torch.int64)

    def learn(self, sums: torch.Tensor) -> None:
        """Remember the checksums of all tokens' rows, in order."""
        assert self.keep is not None
        if bool(torch.isin(sums, self._known.to(sums.device)).all()):
            # A block within the one before, which reads the same rows, maybe in an order of its own.
            return
        real = self.keep.reshape(-1).to(sums.device)
        padding = sums[~real]
        self._padding = torch.cat([self._padding.to(sums.device), padding[~torch.isin(padding, sums[real])]])
        self._known = torch.cat([self._known.to(sums.device), sums])

    def recognised(self, sums: torch.Tensor) -> torch.Tensor | None:
        """Which of some rows are real, bool, from their checksums; None if any of them was never read by a block."""
        if not bool(torch.isin(sums, self._known.to(sums.device)).all()):
            return None
        return ~torch.isin(sums, self._padding.to(sums.device))


def checksums(rows: torch.Tensor) -> torch.Tensor:
    """A number of each row that depends on all its bits and on nothing else.

    Integers are summed, modulo 2⁶⁴, since a sum of floats depends on its order, and with it on the number of rows.

    Args:
        rows: n × features, any floating dtype.

    Returns:
        n, int64, on the device of ``rows``. Rows that differ share a number with a probability below 2⁻⁴⁶ (features of
        16 bits) or 2⁻³⁰ (32 bits).
    """
    integers = rows.detach().contiguous().view(INTEGERS[rows.element_size()])
    generator = torch.Generator().manual_seed(0)
    limits = torch.iinfo(torch.int64)
    factors = torch.randint(limits.min, limits.max, (rows.shape[-1],), generator=generator).to(rows.device) | 1
    return torch.cat([(part.long() * factors).sum(-1) for part in integers.split(CHECKSUM_ROWS)])


def _expert_number(path: str) -> str | None:
    """The number in a path such as `mlp.experts.3.gate_proj`, the last if there are several."""
    return next((part for part in reversed(path.split(".")) if part.isdecimal()), None)
