"""One run of compensation in AutoRound's loop: its budget, its resuming, and what is written at the end."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...adapter.checkpoint import replaced_checkpoint
from ...adapter.compensate import Recipe
from ...adapter.layers import shape_of
from ...adapter.naming import DEFAULT_FOLDER
from ...adapter.vocabulary import AUTO, UNIFORM
from ...loop.budgeting import budgeted_rank
from ...loop.resume import Keeping
from ...loop.run import Run, write_adapter
from ...system.files import require_space, unfinished_folder
from .budget import allocate_ranks
from .config import EoRAConfig
from .modules import quantized_linears
from .moments import IGNORED_TOKEN
from .resume import BlockKeeper, keeping_of

log = logging.getLogger(__name__)

# Bits of a group's scale. A zero point takes as many as a weight.
SCALE_BITS = 16


class LoopRun(Run):
    """State of one run in AutoRound's loop.

    Args:
        config: what the user asked for.
        orchestrator: AutoRound's `BaseOrchestrator` for the run.
    """

    def __init__(self, config: EoRAConfig, orchestrator: Any) -> None:
        super().__init__(config.settled)
        self._orchestrator = orchestrator
        self._plan = config.followed
        self._config = config
        self._keeping: Keeping | None = None
        self._keeper: BlockKeeper | None = None
        # The export's folder, where AutoRound has begun to write before it was asked to save.
        self._begun: Path | None = None

    def begin(self) -> None:
        """Called before the first block of the run.

        Where AutoRound writes each block's weights as soon as it is packed, it writes them into the new folder from
        here on; blocks of an interrupted run are written there again, from what was kept of them.

        Raises:
            OSError: when there is too little space for the export.
        """
        self.factors = {}
        if self.rank == AUTO and self.options.sensitivity == UNIFORM:
            shapes = [shape_of(name, one) for name, one in quantized_linears(self._orchestrator).items()]
            self.rank = budgeted_rank(shapes, self.options)
        context = self._orchestrator.compress_context
        if context.is_immediate_saving:
            target = Path(context.output_dir)
            unfinished = self._begin_export(target)
            context.output_dir = str(unfinished)
            self._begun = target
        keeping = keeping_of(self._config)
        if keeping is not None:
            self._keeper = BlockKeeper(self, self._orchestrator, keeping)
            self._keeper.attach()
            self._keeping = keeping

    def end(self) -> None:
        """Called after the last block of the run, or when the run ends otherwise."""
        if self._keeper is not None:
            self._keeper.detach()
            self._keeper = None

    def describe_tokens(self, token_ids: Sequence[torch.Tensor] | None) -> None:
        """Fingerprint the calibration tokens.

        Args:
            token_ids: of each sample, 1 × tokens; None where AutoRound keeps none.
        """
        self.describe_calibration((ids, int((ids != IGNORED_TOKEN).sum())) for ids in token_ids or ())

    def allocate(self, token_ids: Sequence[torch.Tensor] | None) -> None:
        """Called with the calibration tokens before each block; the first fingerprints them and gives out a budget.

        Args:
            token_ids: as for `describe_tokens`.

        Raises:
            ValueError, NotImplementedError: under a budget, as `allocate_ranks`.
        """
        if not self.calibration:
            self.describe_tokens(token_ids)
        if self.rank == AUTO and self.allocation is None:
            self.allocation = allocate_ranks(self._orchestrator, self.options, token_ids or ())

    def recipe(self, name: str, fixed_rank: int | None = None, *, first: bool = True) -> Recipe:
        """As `Run.recipe`; a plan names the rank of each module."""
        planned = self._plan.modules[name].rank if self._plan is not None else fixed_rank
        return super().recipe(name, planned, first=first)

    def asked(self) -> dict[str, Any]:
        """What is asked of the factors, ready for JSON."""
        asked = self.options.described()
        if self._plan is not None:
            asked["ranks"] = {name: one.rank for name, one in self._plan.modules.items()}
        return asked

    def begin_stage(self, names: Sequence[str]) -> None:
        """Called with modules that are compensated together, before any of them is."""
        if self.allocation is not None:
            self.allocation.begin(names)

    def end_block(self, modules: Mapping[str, torch.nn.Module], seconds: float) -> None:
        """Called once a block's modules are compensated, before they are packed."""
        self.took(seconds)
        if self._keeper is not None:
            self._keeper.quantized(modules)

    def computed(self, block: torch.nn.Module) -> None:
        """Called once a block's outputs are known and its modules hold Ŵ again."""
        if self._keeper is not None:
            self._keeper.computed(block)

    def save(self, save: Callable[[str], Any], output: str | None) -> Any:
        """Have AutoRound export into a new folder, write the adapter there, and put all in place of what was there.

        Several formats are several folders below ``output``; each is replaced in one step.

        Args:
            save: AutoRound's `save_quantized` of a folder, which returns the model and the folder or folders.
            output: the folder that was asked for; None for the one that AutoRound was made with.

        Returns:
            What ``save`` returns, with the folders' final names; None where there was nothing to save.

        Raises:
            OSError: when there is too little space.
        """
        context = self._orchestrator.compress_context
        target = Path(output if output is not None else context.output_dir)
        if self._begun is not None:
            target, unfinished = self._begun, unfinished_folder(self._begun)
        else:
            unfinished = self._begin_export(target)
        saved = save(str(unfinished))
        context.output_dir = self._orchestrator.output_dir = str(target)
        if saved is None:
            return None
        model, folders = saved
        final = []
        for folder in map(Path, [folders] if isinstance(folders, str) else folders):
            place = target / folder.relative_to(unfinished)
            with replaced_checkpoint(place, unfinished=folder) as fresh:
                self._write_adapter(fresh, place)
            log.info("EoRA: %d adapters in %.1f s, written to `%s`.", len(self.factors), self.seconds,
                     place / DEFAULT_FOLDER)  # fmt: skip
            final.append(str(place))
        shutil.rmtree(unfinished, ignore_errors=True)
        self._begun = None
        if self._keeping is not None:
            self._keeping.finish()
        return model, final[0] if isinstance(folders, str) else final

    def _write_adapter(self, checkpoint: Path, place: Path) -> None:
        names = [name for name, _ in self._orchestrator.model_context.model.named_modules()]
        write_adapter(checkpoint, checkpoint / DEFAULT_FOLDER, self.factors, names, self.details(), base_model=place)

    def _begin_export(self, target: Path) -> Path:
        """The new folder to export into, empty."""
        require_space(target.resolve(), _bytes_to_write(self._orchestrator))
        unfinished = unfinished_folder(target)
        shutil.rmtree(unfinished, ignore_errors=True)
        return unfinished

    def details(self) -> dict[str, Any]:
        """What goes into `eora.json` beside the per-module report."""
        quantizer = type(self._orchestrator.alg_composer.block_quantizer).__name__
        return self.describe(f"auto-round, {quantizer}, in its loop", "auto-round")


def _bytes_to_write(orchestrator: Any) -> int:
    """About what an export takes: each weight by its layer's bits and groups, times the number of formats."""
    layers, bits = orchestrator.layer_config or {}, 0.0
    counted: set[int] = set()
    for name, module in orchestrator.model_context.model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            if id(parameter) in counted:
                continue
            counted.add(id(parameter))
            layer = layers.get(name, {}) if part == "weight" else {}
            width = min(layer.get("bits") or SCALE_BITS, SCALE_BITS)
            group = layer.get("group_size")
            scales = (SCALE_BITS + width) / group if width < SCALE_BITS and isinstance(group, int) and group > 0 else 0
            bits += parameter.numel() * (width + scales)
    return int(bits / 8) * len(orchestrator.formats or [None])
