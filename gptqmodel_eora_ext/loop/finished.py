"""Factors of finished blocks, each kept in a folder of its own so that an interrupted run can go on."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..adapter.factors import ModuleFactors
from ..adapter.folder import AdapterFolder
from ..adapter.save import save_adapter

FOLDER = "eora"


class FinishedBlocks:
    """Keeps the factors of finished blocks, each block in an adapter folder of its own below ``root``.

    Args:
        root: where the host keeps its own progress.
        options: what is asked of the factors; blocks that were made with other options are refused.
    """

    def __init__(self, root: Path, options: Mapping[str, Any]) -> None:
        self._root = root
        self._options = dict(options)

    def read(self, blocks: Iterable[str]) -> dict[str, ModuleFactors]:
        """Read the factors of the blocks that the host will skip.

        Args:
            blocks: their names.

        Returns:
            Full module name → factors, on the CPU.

        Raises:
            ValueError: when they were made with other options, or one is missing.
        """
        factors: dict[str, ModuleFactors] = {}
        for block in blocks:
            factors.update(self._read_block(block))
        return factors

    def _read_block(self, block: str) -> dict[str, ModuleFactors]:
        path = self._root / FOLDER / block
        remedy = f"Start again with the options of the interrupted run, or empty `{self._root}`."
        if not path.is_dir():
            raise ValueError(f"EoRA: `{self._root}` has {block} finished by a run without EoRA. {remedy}")
        folder = AdapterFolder.open(path)
        details = dict(folder.details or {})
        if details.get("options") != self._options:
            raise ValueError(
                f"EoRA: {block} in `{self._root}` was compensated with {details.get('options')}, now "
                f"{self._options} is asked. {remedy}"
            )
        reports = details["modules"]
        found = {}
        for name, read in folder.factors(list(folder.keys)):
            report = reports[name]
            found[name] = ModuleFactors(
                # Rank 0 is stored as rank 1 of zeros.
                lora_A=read.lora_A[: report["rank"]],
                lora_B=read.lora_B[:, : report["rank"]],
                packed=read.packed,
                **{key: report[key] for key in ("requested_rank", "tokens", "signal", "error_before", "error_after")},
            )
        return found

    def write(self, block: str, factors: Mapping[str, ModuleFactors]) -> None:
        """Keep a block's factors."""
        if factors:
            details = {"options": self._options}
            save_adapter(
                self._root / FOLDER / block, factors, base_model="", module_names=list(factors), details=details
            )

    def clear(self) -> None:
        """Remove what was kept, once the adapter is written."""
        shutil.rmtree(self._root / FOLDER, ignore_errors=True)
