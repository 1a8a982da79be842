"""Compensating a finished checkpoint, whose Ŵ is known before the data is seen: less to sum, less to compute.

GPTQModel runs a layer once for every subset of modules (q/k/v, then o, gate/up, down), and once more for its outputs.
Three things shorten that here. A subset's forward stops before the module whose input it is run for. A part of the
layer with no module left to compensate (the attention block, once `o_proj` is done) is computed once for each batch,
and its output is kept for later forwards; where the output is that of its last module, whose input is known, only that
module is computed. A part with nothing to compensate at all (a norm) keeps its output, too, and returns it again where
its input is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.nn_modules.hooked_linear import STOP_FORWARD_EXCEPTION

from ...capture import OutputErrorMoment
from ...loop.computed_once import KEPT_BYTES, RememberedBlock, ReusedBlock
from ...system.memory import release_free_memory
from .compensation import Compensation, Moment, layer_of


class CheckpointCompensation(Compensation):
    """Mixin for `CheckpointProcessor`. It keeps, for the layer under way, what `loop.computed_once` keeps."""

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
        self._reused: list[ReusedBlock | RememberedBlock] = []
        self._inputs: dict[int, torch.Tensor] = {}
        self._kept_bytes = 0

    def _trim_memory(self) -> None:
        """Nothing: `_enter_layer` gives memory back once a layer, which is enough where nothing is quantised."""

    def _new_moment(self, module: NamedModule, *, alone: bool) -> Moment:
        weight = module.module.weight.data
        plain = self.run.recipe_for(self.qcfg, module.full_name).is_plain
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
            self._enter_layer(model, layer_of(modules[0]))
        self._inputs = {}
        self._only = modules[0] if len(modules) == 1 else None
        # Where all modules of a subset read one input, the forward may end there.
        if len(self._moments) == 1 and not is_lm_head_module and self.run.full_precision_inputs is None:
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
        with self.run.guarded(self._modules[str(self._stopping)].full_name):
            self._capture(inputs[0])
        raise STOP_FORWARD_EXCEPTION.with_traceback(None)

    def _capture(self, rows: torch.Tensor) -> None:
        keep = self._keep_mask(str(self._stopping), rows)
        batch = self.current_batch_index()
        with self.lock:
            self._moments[str(self._stopping)].add(rows, keep)
            if self._only is not None and batch is not None and self._kept_bytes + rows.nbytes <= KEPT_BYTES:
                self._inputs[batch] = rows.detach()
                self._kept_bytes += rows.nbytes

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
                self._reused.append(RememberedBlock(block, self.current_batch_index, budget))

    def _modules_in(self, child: str) -> set[str]:
        """Full names of what is quantised in a direct child of the layer."""
        return {known for known in self.quantized if known.startswith(f"{self._layer}.{child}.")}

    def _reuse_finished_blocks(self) -> None:
        """Have each direct child of the layer that is done compute each batch once."""
        for name, block in list(self._blocks.items()):
            modules = self._modules_in(name)
            if modules and modules <= self._done:
                last = self._only if self._only is not None and self._only.full_name in modules else None
                known = (last.module, self._inputs) if last is not None else (None, None)
                self._reused.append(ReusedBlock(block, self.current_batch_index, *known))
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
