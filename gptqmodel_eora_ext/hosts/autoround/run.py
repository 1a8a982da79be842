"""One run of compensation in AutoRound's loop: its budget, its resuming, and what is written at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from auto_round import envs

from ...adapter.naming import DEFAULT_FOLDER
from ...adapter.vocabulary import AUTO
from ...loop.resume import FinishedBlocks
from ...loop.run import Run, write_adapter
from .budget import allocate_ranks
from .config import EoRAConfig
from .moments import IGNORED_TOKEN

log = logging.getLogger(__name__)

# AutoRound's record of the blocks whose weights are on disk, one for each group of blocks. It skips them when the run
# is started again; their factors are written before that record is.
MANIFESTS = "group_*/resume_manifest.json"


class LoopRun(Run):
    """State of one run.

    Args:
        config: what the user asked for.
        orchestrator: AutoRound's object for the run.
    """

    def __init__(self, config: EoRAConfig, orchestrator: Any) -> None:
        super().__init__(config.settled)
        self._orchestrator = orchestrator
        self._finished: FinishedBlocks | None = None

    def begin(self) -> None:
        """Called before the first block of the run.

        Raises:
            ValueError: when the blocks that an interrupted run has finished were compensated with other options.
        """
        self.factors = {}
        if envs.AR_RESUME_DIR:
            if self.rank == AUTO:
                raise NotImplementedError(
                    "EoRA: a run under a budget cannot be resumed, since what a block may spend depends on all blocks "
                    "before it. Unset AR_RESUME_DIR, or name a rank."
                )
            root = Path(envs.AR_RESUME_DIR)
            self._finished = FinishedBlocks(root, self.options.described())
            self.factors.update(self._finished.read(_finished_blocks(root)))
            if self.factors:
                log.info("EoRA: %d modules were compensated before the run was interrupted.", len(self.factors))

    def allocate(self, token_ids: Sequence[torch.Tensor] | None) -> None:
        """Called with the calibration tokens before each block; the first call tells them apart and plans a budget."""
        if self.calibration:
            return
        known = token_ids or ()
        self.describe_calibration((ids, int((ids != IGNORED_TOKEN).sum())) for ids in known)
        if self.rank == AUTO:
            self.allocation = allocate_ranks(self._orchestrator, self.options, known)

    def begin_stage(self, names: Sequence[str]) -> None:
        """Called with modules that are compensated together, before any of them is."""
        if self.allocation is not None:
            self.allocation.begin(names)

    def end_block(self, block: str, names: Sequence[str], seconds: float) -> None:
        """Called once a block's modules are compensated."""
        self.took(seconds)
        if self._finished is not None:
            self._finished.write(block, {name: self.factors[name] for name in names})

    def save(self, checkpoint: Path) -> None:
        """Write the adapter into a checkpoint that AutoRound has just exported, and name it there."""
        folder = checkpoint / DEFAULT_FOLDER
        names = [name for name, _ in self._orchestrator.model_context.model.named_modules()]
        write_adapter(checkpoint, folder, self.factors, names, self.details())
        log.info("EoRA: %d adapters in %.1f s, written to `%s`.", len(self.factors), self.seconds, folder)
        if self._finished is not None:
            self._finished.clear()

    def details(self) -> dict[str, Any]:
        """What goes into `eora.json` beside the per-module report."""
        quantizer = type(self._orchestrator.alg_composer.block_quantizer).__name__
        return self.describe(f"auto-round, {quantizer}, in its loop", "auto-round")


def _finished_blocks(root: Path) -> Iterator[str]:
    """Names of the blocks that AutoRound will skip."""
    for manifest in sorted(root.glob(MANIFESTS)):
        yield from json.loads(manifest.read_text(encoding="utf-8"))["completed_blocks"]
