"""Second moments of a block's module inputs, by forwards of AutoRound's own runner over its own cached inputs.

A forward stops at the input that it is run for. Once all modules of a part of the block are compensated (the attention,
after `o_proj`), the part's output cannot change any more. It is then computed once for each batch, from the input of
the part's last module where that is known, and kept: for later forwards, and for AutoRound when it computes the block's
outputs over the same inputs.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from auto_round.compressors.utils import block_forward

from ...capture import OutputErrorMoment, RoutedRows, SecondMoment
from ...loop.computed_once import KEPT_BYTES, ReusedBlock

Moment = SecondMoment | OutputErrorMoment

# AutoRound's calibrator gives this id to tokens that count for nothing: padding, repetitions at a sample's end, and the
# last token of each sample, which has no label.
IGNORED_TOKEN = -100
# A dense block has four stages: q/k/v, o, gate/up, down. Each takes a forward up to its input. Where a block has more
# stages than this, one forward serves all its modules.
MOST_STAGES = 8


class BlockInputs:
    """A quantised block, and the inputs that AutoRound holds for it.

    It keeps outputs of the block's parts for all batches, where the block's inputs take at most `KEPT_BYTES`, and as
    many bytes of the inputs of last modules, until `release`.

    Args:
        block: the block, its weights Ŵ.
        modules: its quantised linear layers by full name.
        runner: AutoRound's `BlockForwardRunner`; its batching, device and autocast are used, not its compiled forward.
        inputs: hidden states, a list of samples (or a dict of them), as the runner takes them.
        input_others: the block's other arguments.
        token_ids: of each sample, 1 × tokens; `IGNORED_TOKEN` is left out of the sums. None: every token counts.
    """

    def __init__(
        self,
        block: torch.nn.Module,
        modules: Mapping[str, torch.nn.Module],
        runner: Any,
        inputs: Any,
        input_others: Mapping[str, Any],
        token_ids: Sequence[torch.Tensor] | None,
    ) -> None:
        self._block = block
        self._modules = modules
        self._runner = copy.copy(runner)
        self._runner.block_forward = block_forward
        self._inputs = inputs
        self._input_others = input_others
        self._token_ids = token_ids
        hidden = inputs["hidden_states"] if isinstance(inputs, dict) else inputs
        count = len(hidden)
        size = self._runner.batch_size
        self._batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
        self._current: int | None = None
        # Parts of the block, and their modules that are still to be compensated.
        self._open: dict[torch.nn.Module, set[str]] = {}
        if sum(one.nbytes for one in hidden) <= KEPT_BYTES:
            parts = [part for part in block.children() if part not in modules.values()]
            found = {part: {name for name, one in modules.items() if one in part.modules()} for part in parts}
            self._open = {part: names for part, names in found.items() if names}
        self._reused: list[ReusedBlock] = []
        self._rows: dict[int, torch.Tensor] = {}
        self._handles = ExitStack()

    def stages(self) -> list[list[str]]:
        """Group the modules by the input that they read, in the order in which the block runs them.

        Compensating stage by stage lets each module see what those before it give once they are compensated. The stages
        are found on the first sample. If that does not reach every module (experts), or if there are more than
        `MOST_STAGES`, all modules are one stage.
        """
        watch = _Watch(self._block, self._modules)
        with torch.no_grad(), watch:
            self._forward(watch, self._batches[0][:1])
        stages: dict[str, list[str]] = {}
        for name, leader in watch.leaders.items():
            stages.setdefault(leader, []).append(name)
        if len(watch.leaders) < len(self._modules) or len(stages) > MOST_STAGES:
            return [list(self._modules)]
        return list(stages.values())

    def moments(
        self, stage: Sequence[str], errors: Callable[[str], OutputErrorMoment | None] = lambda name: None
    ) -> dict[str, Moment]:
        """Second moments of the inputs of a stage's modules; a module that no token reached has none.

        Args:
            stage: one of `stages`.
            errors: for a module that is alone in its stage, an empty moment to sum in place of x xᵀ, or None.

        Returns:
            Full module name → moment; modules that read the same input share one object.
        """
        alone = len(stage) < len(self._modules)
        single = stage[0] if alone and len(stage) == 1 else None
        found = errors(single) if single is not None else None
        sums: dict[str, Moment] = {} if single is None or found is None else {single: found}
        watch = _Watch(self._block, {name: self._modules[name] for name in stage}, stop=alone, sums=sums)
        self._rows = {}
        # Inputs are kept to compute a part of the block once more. The part that comes last is not computed again.
        room = KEPT_BYTES if single is not None and len(self._open) > 1 else 0
        with torch.no_grad(), watch:
            for number, batch in enumerate(self._batches):
                self._current = number
                self._forward(watch, batch)
                if watch.rows is not None and watch.rows.nbytes <= room:
                    self._rows[number] = watch.rows.detach()
                    room -= watch.rows.nbytes
        self._current = None
        if alone:
            (moment,) = watch.sums.values()
            return dict.fromkeys(stage, moment)
        return {name: watch.sums[leader] for name, leader in watch.leaders.items()}

    def compensated(self, stage: Sequence[str]) -> None:
        """Called when the weights of a stage's modules will not change any more."""
        for part, left in list(self._open.items()):
            left -= set(stage)
            if not left:
                del self._open[part]
                if self._open:
                    last = self._modules[stage[0]] if len(stage) == 1 else None
                    self._reused.append(ReusedBlock(part, lambda: self._current, last, self._rows if last else None))

    def expect_outputs(self) -> None:
        """To be called when the next forwards of the block are AutoRound's, batch by batch over the same inputs.

        A batch is recognised by comparing its input; one that is another is computed in full.
        """
        numbers = iter(range(len(self._batches)))

        def recognise(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._current = None
            number = next(numbers, None)
            rows = args[0] if args else kwargs.get("hidden_states")
            if number is None or not isinstance(rows, torch.Tensor) or not isinstance(self._inputs, list):
                return
            expected = torch.cat([self._inputs[index] for index in self._batches[number]], dim=self._runner.batch_dim)
            if torch.equal(expected.to(rows), rows):
                self._current = number

        self._handles.callback(self._block.register_forward_pre_hook(recognise, with_kwargs=True).remove)

    def release(self) -> None:
        """Give the block's parts their own `forward` back."""
        self._handles.close()
        for reused in self._reused:
            reused.release()
        self._reused.clear()
        self._rows = {}

    def _forward(self, watch: _Watch, batch: Sequence[int]) -> None:
        watch.begin_batch(_keep_mask(self._token_ids, batch))
        with contextlib.suppress(_Reached):
            self._runner.forward(self._block, self._inputs, dict(self._input_others), torch.tensor(batch))


class _Reached(Exception):
    """Ends a forward: the input that it was run for is known."""


def _keep_mask(token_ids: Sequence[torch.Tensor] | None, batch: Sequence[int]) -> torch.Tensor | None:
    """Which tokens of some samples count, samples × tokens, bool; None for all of them, also where that is unknown."""
    if token_ids is None or len(token_ids) <= batch[-1]:
        return None
    chosen = [token_ids[index].reshape(1, -1) for index in batch]
    if len({ids.shape for ids in chosen}) > 1:
        return None
    return torch.cat(chosen) != IGNORED_TOKEN


class _Watch:
    """Hooks that sum x xᵀ, once for modules that read the same tensor.

    Args:
        block: the block that is run.
        modules: modules of it to watch, by name.
        stop: whether to end the forward at the first of them.
        sums: module's name → moment to add to; a new one is made for others.
    """

    def __init__(
        self,
        block: torch.nn.Module,
        modules: Mapping[str, torch.nn.Module],
        *,
        stop: bool = False,
        sums: Mapping[str, Moment] = types.MappingProxyType({}),
    ) -> None:
        self.sums = dict(sums)
        # The last input that was added.
        self.rows: torch.Tensor | None = None
        # Module → the one that read the same input first and has the sum; in the order in which they ran.
        self.leaders: dict[str, str] = {}
        paths = {id(module): path for path, module in block.named_modules()}
        self._modules = {name: (module, paths[id(module)]) for name, module in modules.items()}
        self._block = block
        self._stop = stop
        self._handles = ExitStack()
        self._keep: torch.Tensor | None = None
        # Inputs of the batch under way by their `id`, kept so that no other tensor gets the same `id`.
        self._seen: dict[int, tuple[torch.Tensor, str]] = {}

    def __enter__(self) -> None:
        self._routed = self._handles.enter_context(RoutedRows(self._block, lambda: self._keep))
        for name, (module, path) in self._modules.items():
            self._handles.callback(module.register_forward_pre_hook(self._hook(name, path)).remove)

    def __exit__(self, *exception: object) -> None:
        self._handles.close()
        # It refers back to this object. In a circle of references all sums would stay until garbage is collected.
        del self._routed
        self._seen = {}

    def begin_batch(self, keep: torch.Tensor | None) -> None:
        """Rows of the next forward to count, batch × tokens; None for all."""
        self._keep = keep
        self._seen = {}
        self.rows = None

    def _hook(self, name: str, path: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0]
            first = self._seen.setdefault(id(rows), (rows, name))[1]
            leader = self.leaders.setdefault(name, first)
            if leader != name:
                if first != leader:
                    raise RuntimeError(
                        f"{name} read the input of {leader} in one batch and another input in a later one; such a "
                        f"block cannot be compensated in AutoRound's loop. Use `eora generate` on its checkpoint."
                    )
                return
            keep = self._routed.real(path, rows)
            moment = self.sums.get(name)
            if moment is None:
                moment = self.sums[name] = SecondMoment(rows.shape[-1], name)
            # The block runs under autocast, which would compute these products in 16 bits.
            with torch.autocast(rows.device.type, enabled=False):
                moment.add(rows, keep)
            self.rows = rows
            if self._stop:
                raise _Reached

        return hook
