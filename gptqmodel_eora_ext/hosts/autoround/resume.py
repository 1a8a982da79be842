"""Resuming in AutoRound's block loop, under a budget as well.

AutoRound 0.16 has a resuming of its own (`AR_RESUME_DIR`), which keeps tensors as pickles, knows nothing of adapters or
of random generators, and relies on blocks being exported as they are made. Its loop calls an object once a block is
done, and takes from it where to begin. Such an object of ours stands in the place of AutoRound's here. What a finished
block consists of is kept in files that execute nothing when they are read, and put back before the loop begins: each
linear layer is packed by AutoRound itself, for the form alone, and then takes the values that were kept.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from auto_round import envs
from auto_round.compressors.utils import immediate_pack
from auto_round.modeling.fused_moe.replace_modules import materialize_model_
from auto_round.utils import check_to_quantized, convert_module_to_hp_if_necessary, get_module, mv_module_from_gpu

from ...loop.resume import NEXT, Keeping, factors_state, layer_file, load_run_state, read_factors, run_state
from ...plan.sensitivity import fingerprint
from ...system.kept import Kept
from ...system.randomness import random_state, set_random_state
from .budget import layered
from .modules import quantized_linears

if TYPE_CHECKING:
    from .run import LoopRun

log = logging.getLogger(__name__)

# Below `AR_RESUME_DIR`, where AutoRound makes folders of its own.
FOLDER = "eora"
# How weights lie on their grid; packing reads both.
GRID = ("scale", "zp")


def keeping_of(config: Any) -> Keeping | None:
    """Where a run keeps its state: as our commands say, else below AutoRound's `AR_RESUME_DIR`; None for nowhere."""
    if config.keeping is not None:
        known: Keeping = config.keeping
        return known
    return Keeping(Path(envs.AR_RESUME_DIR) / FOLDER) if envs.AR_RESUME_DIR else None


class BlockKeeper:
    """Keeps a run's finished blocks, and puts those of an interrupted run in place.

    Args:
        run: whose factors are kept.
        orchestrator: AutoRound's `BaseOrchestrator` for the run.
        keeping: where.
    """

    def __init__(self, run: LoopRun, orchestrator: Any, keeping: Keeping) -> None:
        self._run, self._orchestrator, self._keeping = run, orchestrator, keeping
        self._kept: Kept | None = None
        self._state: dict[str, Any] = {}
        self._group: list[str] = []
        # Names of finished blocks, in order.
        self._done: list[str] = []
        # Of the block under way: scale and zero point of each linear layer, and its tensors.
        self._grids: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, torch.Tensor] | None = None

    def attach(self) -> None:
        """Called before the first block: have AutoRound's loop ask this object."""
        orchestrator = self._orchestrator
        # An attribute of the instance hides the method, for this run alone.
        orchestrator._quantize_blocks = functools.partial(self._quantize_blocks, orchestrator._quantize_blocks)
        if orchestrator.compress_context.is_immediate_saving:
            self._watch_writer(orchestrator.shard_writer)

    def detach(self) -> None:
        """Called after the last block, or when the run ends otherwise."""
        self._orchestrator.__dict__.pop("_quantize_blocks", None)
        self._keeping.__exit__(None, None, None)

    # What AutoRound's loop asks of the object in the place of its own -------------------------------------------

    @property
    def resume_index(self) -> int:
        """Number of finished blocks of the group under way."""
        return sum(name in self._done for name in self._group)

    def mark_block_done(self, name: str, q_input: Any, input_ids: Any) -> None:
        """Called with a block's name once it is packed, and with what the next block starts from."""
        assert self._kept is not None
        if self._tensors is None:
            self._tensors = get_module(self._orchestrator.model_context.model, name).state_dict()
        factors = [one for one in self._run.factors if one.startswith(f"{name}.")]
        block = {
            "name": name,
            "grids": self._grids,
            "tensors": self._tensors,
            "factors": factors_state(self._run.factors, factors),
        }
        self._kept.keep(layer_file(len(self._done)), block)
        self._done.append(name)
        following = {
            "done": self._done,
            "q_input": q_input,
            "input_ids": input_ids,
            "run": run_state(self._run),
            "random": random_state(),
        }
        self._kept.keep(NEXT, following)
        self._grids, self._tensors = {}, None
        self._kept.step_done()

    # Around a group of blocks ----------------------------------------------------------------------------------

    def _quantize_blocks(
        self,
        original: Callable[..., Any],
        model: torch.nn.Module,
        inputs: Any,
        block_names: Sequence[str],
        *,
        nblocks: int = 1,
        pbar: Any = None,
        input_others_extra_blocks: dict[str, Any] | None = None,
        token_ids: Sequence[torch.Tensor] | None = None,
        **given: Any,
    ) -> Any:
        common = {"nblocks": nblocks, "pbar": pbar, "input_others_extra_blocks": input_others_extra_blocks,
                  "token_ids": token_ids}  # fmt: skip
        if nblocks != 1:
            log.warning("EoRA: blocks that are tuned %d at a time are not kept; this run cannot be resumed.", nblocks)
            return original(model, inputs, block_names, **common, **given)
        self._group = list(block_names)
        if self._kept is None:
            self._open(token_ids)
        finished = self._group[: self.resume_index]
        for name in finished:
            inputs = (input_others_extra_blocks or {}).pop(name, inputs)
            self._put_in_place(name)
        if len(finished) == len(self._group):
            return None
        given |= {"resume_state": self}
        if finished:
            given |= {"q_input": self._state["q_input"], "resume_input_ids": self._state["input_ids"]}
            if pbar is not None:
                pbar.update(len(finished))
        if self._state:
            load_run_state(self._run, self._state["run"])
            set_random_state(self._state["random"])
            self._state = {}
        return original(model, inputs, block_names, **common, **given)

    def _open(self, token_ids: Sequence[torch.Tensor] | None) -> None:
        self._run.describe_tokens(token_ids)
        self._kept = self._keeping.open(self._asked())
        # The survey that a budget asks for is kept by itself.
        self._run.allocate(token_ids)
        if NEXT in self._kept:
            self._state = self._kept.read(NEXT)
            self._done = list(self._state["done"])
            log.info("EoRA: %d blocks were finished before the run was interrupted.", len(self._done))

    def _asked(self) -> dict[str, Any]:
        """All that the run's result depends on, ready for JSON."""
        orchestrator = self._orchestrator
        model = orchestrator.model_context.model
        names = list(quantized_linears(orchestrator))
        composer = orchestrator.alg_composer
        members = [composer.block_quantizer, *composer.preprocessors]
        calibration = orchestrator.calibration_context
        return {
            "host": f"auto-round {version('auto-round')}",
            "model": fingerprint(layered(model, names), names, (), "model"),
            "calibration": self._run.calibration,
            "adapter": self._run.asked(),
            "scheme": {name: _plain(one) for name, one in (orchestrator.layer_config or {}).items()},
            "tuning": {type(one).__name__: _plain(vars(getattr(one, "config", one))) for one in members},
            "windows": _plain(vars(calibration)),
            "seed": orchestrator.seed,
            "precision": str(orchestrator.model_context.amp_dtype),
            "formats": [one.output_format for one in orchestrator.formats or ()],
        }

    # A block ---------------------------------------------------------------------------------------------------

    def quantized(self, modules: Mapping[str, torch.nn.Module]) -> None:
        """Called once a block's linear layers hold Ŵ, before they are packed."""
        self._grids = {
            name: {key: getattr(one, key) for key in GRID if hasattr(one, key)} for name, one in modules.items()
        }

    def computed(self, block: torch.nn.Module) -> None:
        """Called once a block's outputs are known. Where AutoRound moves a block to the disk before it is done with it,
        its tensors are taken here."""
        context = self._orchestrator.compress_context
        if context.low_cpu_mem_usage and not context.is_immediate_saving:
            self._tensors = {key: one.detach().clone() for key, one in block.state_dict().items()}

    def _watch_writer(self, writer: Any) -> None:
        """AutoRound's writer of shards lets go of a block's tensors as it takes them; they are noted down before.

        For its own resuming AutoRound ends a shard with every block. Here blocks are written again from what is kept,
        so that shards are as large as they always are.
        """
        write, flush = writer.write, writer._flush_shard
        writing = False

        @functools.wraps(write)
        def watched(m: torch.nn.Module | None = None, *args: Any, **kwargs: Any) -> Any:
            nonlocal writing
            if m is not None:
                self._tensors = m.state_dict()
            writing = True
            try:
                return write(m, *args, **kwargs)
            finally:
                writing = False

        @functools.wraps(flush)
        def flushed() -> None:
            if writing:
                flush()

        writer.write, writer._flush_shard = watched, flushed

    def _put_in_place(self, name: str) -> None:
        """Have the model hold a finished block as the loop has left it."""
        assert self._kept is not None
        kept = self._kept.read(layer_file(self._done.index(name)))
        orchestrator = self._orchestrator
        context, model = orchestrator.compress_context, orchestrator.model_context.model
        block = get_module(model, name)
        streaming = getattr(orchestrator.model_context, "_disk_stream_index", None) is not None
        if context.low_cpu_mem_usage or envs.AR_DISK_STREAM_MODEL or streaming:
            orchestrator._offloader.reload(model, name)
        materialize_model_(block)
        convert_module_to_hp_if_necessary(block, orchestrator.model_context.amp_dtype, "cpu")
        mv_module_from_gpu(block)
        for path, grid in kept["grids"].items():
            for key, value in grid.items():
                setattr(get_module(model, path), key, value)
        if context.is_immediate_packing:
            for _, module in list(block.named_modules()):
                if hasattr(module, "bits") and check_to_quantized(module):
                    immediate_pack(module.global_name, orchestrator.layer_config)
        block.load_state_dict(kept["tensors"], assign=True)
        for parameter in block.parameters():
            parameter.requires_grad_(False)
        self._run.factors.update(read_factors(kept["factors"]))
        if context.is_immediate_saving:
            orchestrator.shard_writer.write(block, is_finalize=False)
        elif context.low_cpu_mem_usage:
            orchestrator._offloader(model, name, overwrite=True)
        self._tensors = None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config is a number, a word or a dtype."""
    simple = (bool, int, float, str, type(None))
    return {
        key: str(one) if isinstance(one, torch.dtype) else one
        for key, one in values.items()
        if isinstance(one, (*simple, torch.dtype))
    }
