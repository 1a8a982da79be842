"""Compensating a finished checkpoint, whose Ŵ is known before the data is seen: less to sum, less to compute.

GPTQModel runs a layer once for every subset of modules (q/k/v, then o, gate/up, down), and once more for its outputs.
Here a subset's forward stops before the module whose input it is there for. A part of the layer that has no module left
to compensate (the attention block, once `o_proj` is done) computes each batch once more and then gives what it gave; if
its output is that of its last module, whose input is known, it computes that module alone. A part that has none to
compensate (a norm) gives what it gave wherever its input is what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.nn_modules.hooked_linear import STOP_FORWARD_EXCEPTION

from ...capture import OutputErrorMoment
from ...memory import release_free_memory
from .processors import Compensation, Moment

# Inputs of last modules, and in- and outputs of norms, that are kept for a layer, over all batches: each of the two.
KEPT_BYTES = 1 << 30


class CheckpointCompensation(Compensation):
    """Mixin for `CheckpointProcessor`."""

    quantized: Any
    quantized_weight: Callable[[NamedModule], torch.Tensor]
    is_skipped: Callable[[NamedModule], bool]

    def equip(self, run: Any) -> None:
        super().equip(run)
        self._stop: torch.utils.hooks.RemovableHandle | None = None
        self._stopping: str | None = None
        self._done: set[str] = set()
        self._layer = ""
        self._blocks: dict[str, torch.nn.Module] = {}
        self._reused: list[_ReusedBlock | _RememberedBlock] = []
        self._inputs: dict[int, torch.Tensor] = {}
        self._kept_bytes = 0

    def _trim_memory(self) -> None:
        """Once a layer (`_enter_layer`): nothing is quantised here, so there is less to give back."""

    def _new_moment(self, module: NamedModule, *, alone: bool) -> Moment:
        weight = module.module.weight.data
        recipe = self.run.recipe_for(self.qcfg, module.full_name)
        plain = recipe.objective == "eora" and recipe.factor_bits == 16 and recipe.choose is None
        if not (alone and plain and isinstance(module.module, torch.nn.Linear)) or self.is_skipped(module):
            return super()._new_moment(module, alone=alone)
        if not OutputErrorMoment.is_cheaper(*weight.shape):
            return super()._new_moment(module, alone=alone)
        return OutputErrorMoment(weight, self.quantized_weight(module), module.full_name)

    # Less to compute -------------------------------------------------------------------------------------------

    def begin_shared_input_capture(
        self, model: Any, subset_names: list[str], is_lm_head_module: bool = False
    ) -> dict[str, str]:
        leaders = super().begin_shared_input_capture(model, subset_names, is_lm_head_module)
        modules = [self._modules[name] for name in subset_names if name in self._modules]
        if modules:
            self._enter_layer(model, modules[0].full_name.removesuffix(f".{modules[0].name}"))
        self._inputs = {}
        self._only = modules[0] if len(modules) == 1 else None
        # Where all of a subset read one input, nothing beyond it is wanted.
        if len(self._moments) == 1 and not is_lm_head_module and self.run.native_inputs is None:
            self._stopping = next(iter(self._moments))
            self._stop = self._modules[self._stopping].module.register_forward_pre_hook(self._capture_and_stop)
        return leaders

    def end_shared_input_capture(self, subset_names: list[str]) -> Any:
        if self._stop is not None:
            self._stop.remove()
            self._stop = self._stopping = None
        return super().end_shared_input_capture(subset_names)

    def pre_process_fwd_hook(self, name: str) -> Callable[..., None]:
        if self._stopping is not None:
            return lambda module, inputs, output: None
        return super().pre_process_fwd_hook(name)

    def _capture_and_stop(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0]
        mask = getattr(self._mask_tls, "value", None)
        keep = mask if torch.is_tensor(mask) and mask.shape == rows.shape[:-1] else None
        batch = self.current_batch_index()
        with self.lock:
            self._moments[str(self._stopping)].add(rows, keep)
            if self._only is not None and batch is not None and self._kept_bytes + rows.nbytes <= KEPT_BYTES:
                self._inputs[batch] = rows.detach()
                self._kept_bytes += rows.nbytes
        raise STOP_FORWARD_EXCEPTION.with_traceback(None)

    def process(self, module: NamedModule, *args: Any, **kwargs: Any) -> None:
        super().process(module, *args, **kwargs)
        with self.lock:
            self._done.add(module.full_name)
            self._reuse_finished_blocks()

    def _enter_layer(self, model: Any, path: str) -> None:
        if path == self._layer:
            return
        self._release_blocks()
        release_free_memory()
        self._layer = path
        self._blocks = dict(model.model.get_submodule(path).named_children())
        budget = [KEPT_BYTES]
        for name, block in self._blocks.items():
            if not self._modules_in(name):
                self._reused.append(_RememberedBlock(block, self.current_batch_index, budget))

    def _modules_in(self, child: str) -> set[str]:
        """Full names of what is quantised in a direct child of the layer."""
        return {known for known in self.quantized if known.startswith(f"{self._layer}.{child}.")}

    def _reuse_finished_blocks(self) -> None:
        """Have each direct child of the layer that is done compute each batch once."""
        for name, block in list(self._blocks.items()):
            modules = self._modules_in(name)
            if modules and modules <= self._done:
                last = self._only if self._only is not None and self._only.full_name in modules else None
                inputs = self._inputs if last is not None else {}
                self._reused.append(_ReusedBlock(block, last, inputs, self.current_batch_index))
                del self._blocks[name]

    def _release_blocks(self) -> None:
        for reused in self._reused:
            reused.release()
        self._reused.clear()
        self._inputs = {}
        self._kept_bytes = 0

    def finalize(self, *args: Any, **kwargs: Any) -> None:
        self._release_blocks()
        super().finalize(*args, **kwargs)  # type: ignore[misc]


class _ReusedBlock:
    """Stands in for a block's `forward`: computes each batch once.

    Args:
        block: its weights, and its input for a batch, do not change any more.
        last: the module of the block that comes last, if known.
        inputs: inputs of ``last``, by batch; emptied as they are used.
        current_batch: tells the batch under way.
    """

    def __init__(
        self,
        block: torch.nn.Module,
        last: NamedModule | None,
        inputs: dict[int, torch.Tensor],
        current_batch: Callable[[], int | None],
    ) -> None:
        self._block = block
        self._forward = block.forward
        self._last = last
        self._inputs = inputs
        self._current_batch = current_batch
        self._outputs: dict[int, Any] = {}
        # Whether the block's output is that of its last module; found out on the first batch.
        self._ends_with_last: bool | None = None
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
        found = self._last.module(rows)
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
        self._outputs.clear()
        self._inputs.clear()


class _RememberedBlock:
    """Stands in for the `forward` of a block of one tensor in, one tensor out, whose weights do not change.

    Args:
        block: a norm, most likely.
        current_batch: tells the batch under way.
        budget: bytes that all of a layer's may still keep.
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
            # Copies, since a layer may go on in place.
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
