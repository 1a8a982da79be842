"""One run of compensation in AutoRound's loop: what is asked, what has been found, and what is written at the end."""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from auto_round import envs

from ... import __version__
from ...adapter import ModuleFactors
from ...compensate import Recipe
from ...ranks import RankAllocation
from ..autoround_format import name_adapter
from ..peft import save_adapter
from .config import EoRAConfig
from .moments import IGNORED_TOKEN
from .resume import FinishedBlocks

log = logging.getLogger(__name__)


class LoopRun:
    """State of one run.

    Args:
        config: what the user asked for.
        orchestrator: AutoRound's object for the run.
    """

    def __init__(self, config: EoRAConfig, orchestrator: Any) -> None:
        self.options = config.options()
        self.factors: dict[str, ModuleFactors] = {}
        self.seconds = 0.0
        self.allocation: RankAllocation | None = None
        self._orchestrator = orchestrator
        self._calibration: dict[str, Any] = {}
        self._finished: FinishedBlocks | None = None

    def begin(self) -> None:
        """Called before the first block of the run.

        Raises:
            ValueError: when the blocks that an interrupted run has finished were compensated with other options.
        """
        self.factors = {}
        if envs.AR_RESUME_DIR:
            if self.options.get("budget") is not None:
                raise NotImplementedError(
                    "EoRA: a run under a budget cannot be resumed, since what a block may spend depends on all blocks "
                    "before it. Unset AR_RESUME_DIR, or name a rank."
                )
            self._finished = FinishedBlocks(Path(envs.AR_RESUME_DIR), self.options)
            self.factors.update(self._finished.read())
            if self.factors:
                log.info("EoRA: %d modules were compensated before the run was interrupted.", len(self.factors))

    # Ranks -----------------------------------------------------------------------------------------------------

    def allocate(self, token_ids: Sequence[torch.Tensor] | None) -> None:
        """Called with the calibration tokens before each block; the first call tells them apart and plans a budget."""
        if self._calibration:
            return
        self._calibration = describe(token_ids or ())
        if self.options.get("budget") is not None:
            from .budget import allocate_ranks

            self.allocation = allocate_ranks(self._orchestrator, self.options, token_ids or ())

    def begin_stage(self, names: Sequence[str]) -> None:
        """Called with modules that are compensated together, before any of them is."""
        if self.allocation is not None:
            self.allocation.begin(names)

    def recipe(self, name: str) -> Recipe:
        """What a module's factors should be."""
        objective, bits = self.options["objective"], self.options["factor_bits"]
        if self.allocation is None:
            return Recipe(self.options["rank"], objective, bits)
        if name not in self.allocation.options:
            return Recipe(0, objective, bits)
        most = self.allocation.options[name].ranks[-1]
        return Recipe(most, objective, bits, functools.partial(self.allocation.choose, name))

    def end_block(self, block: str, names: Sequence[str], seconds: float) -> None:
        """Called once a block's modules are compensated."""
        self.seconds += seconds
        if self._finished is not None:
            self._finished.write(block, {name: self.factors[name] for name in names})

    # Saving ----------------------------------------------------------------------------------------------------

    def save(self, checkpoint: Path) -> None:
        """Write the adapter into a checkpoint that AutoRound has just exported, and name it there."""
        folder = checkpoint / "eora"
        model = self._orchestrator.model_context.model
        names = [name for name, _ in model.named_modules()]
        save_adapter(folder, self.factors, base_model=str(checkpoint), module_names=names, details=self.details())
        name_adapter(checkpoint, folder, self.factors)
        log.info("EoRA: %d adapters in %.1f s, written to `%s`.", len(self.factors), self.seconds, folder)
        if self._finished is not None:
            self._finished.clear()

    def details(self) -> dict[str, Any]:
        """What goes into `eora.json` beside the per-module report."""
        quantizer = type(self._orchestrator.alg_composer.block_quantizer).__name__
        hosts = {name: version(name) for name in ("auto-round", "torch", "transformers", "peft")}
        allocation = self.allocation
        return {
            "objective": self.options["objective"],
            "factor_bits": self.options["factor_bits"],
            "rank": self.options["rank"],
            **(
                {"allocation": {**allocation.report(), "sensitivity": self.options["sensitivity"]}}
                if allocation
                else {}
            ),
            "method": f"auto-round, {quantizer}, in its loop",
            "calibration": self._calibration,
            "seconds": round(self.seconds, 3),
            "versions": {"gptqmodel-eora-ext": __version__, "python": platform.python_version(), **hosts},
        }


def describe(token_ids: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Fingerprint the calibration tokens, so that an adapter tells what it was made on."""
    digest = hashlib.sha256()
    tokens = 0
    for ids in token_ids:
        digest.update(ids.to(torch.int64).cpu().numpy().tobytes())
        tokens += int((ids != IGNORED_TOKEN).sum())
    return {"batches": len(token_ids), "tokens": tokens, "sha256": digest.hexdigest()}
