"""Compensation in AutoRound's block loop: right after a block is quantised, before anything reads its output.

1. AutoRound tunes and quantises a block: each weight W becomes Ŵ.
2. The quantised block is run over the inputs that AutoRound holds for it, up to where q, k and v read theirs. That
   gives the second moments of their inputs.
3. Their factors are solved for, and each of these weights becomes Ŵ + BA. Then o, gate/up and down follow in the same
   way, so that each module is compensated for what it will really read.
4. AutoRound computes the block's outputs. Parts of the block whose outputs are known by then are not computed again.
   Where AutoRound propagates quantised inputs, it tunes the next block on these outputs.
5. Ŵ is put back, and AutoRound packs it as usual.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from auto_round.algorithms.transforms.base import BasePreprocessor

from ...adapter.compensate import Recipe, compensate
from ...adapter.layers import oriented
from ...capture import OutputErrorMoment, SecondMoment
from ...loop.place import put_in_place
from ...loop.weights import check_weights
from ...system.distributed import refuse_shared
from .checks import TUNING, check_composition, check_dataset, check_experts, check_formats
from .config import EoRAConfig
from .modules import is_quantized
from .moments import BlockInputs, Moment
from .planned import check_plan
from .run import LoopRun

log = logging.getLogger(__name__)


class EoRATransform(BasePreprocessor):
    """AutoRound's pipeline member for `EoRAConfig`. One object serves one run of one model.

    In memory beside AutoRound's own: W and Ŵ of the block under way, and what `BlockInputs` keeps.
    """

    config: EoRAConfig

    def __init__(self, config: EoRAConfig) -> None:
        super().__init__(config)
        self._composer: Any = None
        self._inputs: tuple[Any, Any, Any] | None = None
        self._block: Any = None
        self._held: BlockInputs | None = None
        self._weights: dict[str, torch.Tensor] = {}
        self._quantized: dict[str, torch.Tensor] = {}

    # The run ---------------------------------------------------------------------------------------------------

    def bind(self, orchestrator: Any) -> None:
        """Called when AutoRound has resolved scheme, layers and formats, before it looks at any data.

        Raises:
            ValueError: for options that contradict each other, calibration of another tokenizer, or weights with NaN.
            PlanError: for a plan of another model, or one whose widths AutoRound was not given.
            NotImplementedError: for a scheme, an algorithm, or a format that compensation does not compose with, or a
            mixture of experts that AutoRound does not serve.
        """
        super().bind(orchestrator)
        refuse_shared(*TUNING)
        self.config.validate()
        check_composition(orchestrator)
        check_experts(orchestrator)
        if self.config.followed is not None:
            check_plan(orchestrator, self.config.followed)
        check_dataset(orchestrator)
        check_weights(orchestrator.model_context.model.named_parameters())
        if orchestrator.formats is not None:
            check_formats(orchestrator.formats, orchestrator.model_context.model)
        self.run = LoopRun(self.config, orchestrator)
        # An attribute of the instance hides the method, so that other objects and their runs are not touched.
        save: Callable[..., Any] = orchestrator.save_quantized
        orchestrator.save_quantized = functools.wraps(save)(functools.partial(self._save_quantized, save))

    def prepare_run(self, composer: Any = None) -> None:
        """Called once before the first block."""
        self._composer = composer
        # Last, so that W is what the other algorithms (AWQ) have made of it.
        composer.preprocessors.remove(self)
        composer.preprocessors.append(self)
        compress = composer.compress_block
        composer.compress_block = functools.wraps(compress)(functools.partial(self._compress_block, compress))
        self.run.begin()

    def finalize_run(self) -> None:
        """Called once after the last block."""
        if self._composer is not None:
            self._composer.__dict__.pop("compress_block", None)
            self._composer = None
        self.run.end()

    def _save_quantized(
        self, save: Callable[..., Any], output_dir: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        wants_folders = kwargs.pop("return_folders", False)
        saved = self.run.save(lambda folder: save(folder, *args, return_folders=True, **kwargs), output_dir)
        if saved is None:
            return None
        return saved if wants_folders else saved[0]

    # A block ---------------------------------------------------------------------------------------------------

    def _compress_block(
        self,
        compress: Callable[..., Any],
        block: torch.nn.Module,
        fp_inputs: Any,
        input_others: Any,
        block_ctx: Any,
        q_inputs: Any = None,
        input_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Remember the block's inputs for `post_quantize_block`, and put Ŵ back once its outputs are computed."""
        self.run.allocate(input_ids)
        self._inputs = (fp_inputs if q_inputs is None else q_inputs, input_others, input_ids)
        self._block = block
        done = False
        try:
            found = compress(
                block, fp_inputs, input_others, block_ctx, q_inputs=q_inputs, input_ids=input_ids, **kwargs
            )
            done = True
            return found
        finally:
            for name, quantized in self._quantized.items():
                block_ctx.model.get_submodule(name).weight.data = quantized
            if self._held is not None:
                self._held.release()
            self._inputs = self._block = self._held = None
            self._quantized = {}
            self._weights = {}
            if done:
                self.run.computed(block)

    def register_fp_input_forward_hooks(self, block: torch.nn.Module) -> list[Any]:
        """No hooks: the inputs of the quantised block are wanted here, not those of the full-precision one."""
        return []

    def pre_quantize_block(self, ctx: Any) -> None:
        """Keep a copy of each weight W of the block."""
        if self._inputs is None:
            raise NotImplementedError(
                "EoRA: compensation runs in AutoRound's own loop (`quantize`, `quantize_and_save`), not through "
                "`quantize_block`. Use `eora generate` on the finished checkpoint."
            )
        for name, linear in _quantized_linears(self._block).items():
            self._weights[name] = linear.weight.detach().clone()

    @torch.no_grad()
    def post_quantize_block(self, ctx: Any) -> None:
        """Compensate every module that was quantised."""
        assert self._inputs is not None
        start = time.perf_counter()
        modules = {name: ctx.model.get_submodule(name) for name in self._weights}
        if modules:
            self._held = held = BlockInputs(self._block, modules, self._composer.block_forward, *self._inputs)
            for stage in held.stages():
                moments = held.moments(stage, functools.partial(self._error_moment, modules))
                self.run.begin_stage(stage)
                for name in stage:
                    with self.run.guarded(name):
                        self._compensate(name, modules[name], moments.get(name))
                    self.run.raise_failure()
                held.compensated(stage)
            held.expect_outputs()
        self.run.end_block(modules, time.perf_counter() - start)
        if ctx.pbar is not None:
            ctx.pbar.set_postfix_str(f"EoRA {self.run.seconds:.0f} s", refresh=False)

    def _error_moment(self, modules: dict[str, Any], name: str) -> OutputErrorMoment | None:
        """The moment of a module's output error, to be summed in place of x xᵀ; None where x xᵀ takes fewer operations,
        or where the factors that are asked for need it."""
        linear = modules[name]
        if not self.run.recipe(name).is_plain or not isinstance(linear, torch.nn.Linear):
            return None
        if not OutputErrorMoment.is_cheaper(linear.out_features, linear.in_features):
            return None
        return OutputErrorMoment(self._weights[name], linear.weight.data, name)

    def _compensate(self, name: str, linear: Any, moment: Moment | None) -> None:
        weight, quantized = self._weights.pop(name), linear.weight.data
        outer, inner = oriented(linear, weight), oriented(linear, quantized)
        recipe: Recipe = self.run.recipe(name)
        factors = compensate(outer, inner, moment or SecondMoment(outer.shape[1], name), recipe, name=name)
        self._quantized[name] = put_in_place(linear, factors)
        self.run.record(name, factors)


def _quantized_linears(block: torch.nn.Module) -> dict[str, Any]:
    """The block's linear layers that AutoRound quantises, by full name."""
    return {
        str(module.global_name): module
        for module in block.modules()
        if is_quantized(module)
    }
