"""What an adapter is and what it bought, read from its folder without loading a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.gguf.lora import read_lora_header
from ..formats.names import ADAPTER_CONFIG, MODEL_CONFIG, QUANTIZE_CONFIG
from .errors import AdapterError
from .folder import AdapterFolder
from .naming import DEFAULT_FOLDER, named_folder, read_entry
from .settings import MODULES


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter in figures.

    Attributes:
        folder: where it is; the file, for one in GGUF.
        ranks: module → rank; by the names of the model's tensors, for one in GGUF.
        bytes: of the weights file.
        factor_bits: 16 for a plain PEFT adapter, 8 or 4 for packed factors.
        details: `eora.json` without the modules; empty for an adapter that another tool made.
        modules: module → report (rank, tokens, signal, error_before, error_after, bytes).
    """

    folder: Path
    ranks: Mapping[str, int]
    bytes: int
    factor_bits: int
    details: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, Any]]

    def error_left(self) -> float:
        """Share of the weighted error that the adapter leaves: geometric mean over modules, nan when unknown."""
        shares = [m["error_after"] / m["error_before"] for m in self.modules.values() if m["error_before"] > 0]
        shares = [share for share in shares if share > 0]
        return math.exp(sum(map(math.log, shares)) / len(shares)) if shares else math.nan

    def as_json(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "folder": str(self.folder),
            "bytes": self.bytes,
            "factor_bits": self.factor_bits,
            "ranks": dict(self.ranks),
            **self.details,
            "modules": dict(self.modules),
        }


def find_adapter(path: str | Path, *, required: bool = True) -> Path | None:
    """Return the adapter's folder for a checkpoint or an adapter folder.

    A checkpoint without `quantize_config.json` cannot name its adapter; there it is the folder `eora`, if any.

    Args:
        path: a checkpoint, or an adapter folder.
        required: whether a checkpoint that names no adapter is an error; otherwise it gives None.

    Raises:
        AdapterError: when there is none, when the checkpoint's entry has a wrong form, or when it leads out of the
            checkpoint, where loading would not follow it either (`naming.named_folder`).
    """
    path = Path(path)
    if (path / ADAPTER_CONFIG).is_file():
        return path
    if not (path / QUANTIZE_CONFIG).is_file() and (path / MODEL_CONFIG).is_file():
        # Pruned models and other tools' formats have no file to name an adapter in.
        beside = path / DEFAULT_FOLDER
        if (beside / ADAPTER_CONFIG).is_file() and not beside.is_symlink():
            return beside
        if not required:
            return None
    if not (path / QUANTIZE_CONFIG).is_file() and required:
        raise AdapterError(
            f"`{path}` is neither an adapter ({ADAPTER_CONFIG}) nor a checkpoint that has one: it has neither "
            f"{QUANTIZE_CONFIG}, which would name it, nor a folder `{DEFAULT_FOLDER}`."
        )
    entry = read_entry(path)
    if entry is None and required:
        raise AdapterError(f"The checkpoint `{path}` names no adapter. Make one with `eora generate`.")
    return named_folder(path, entry) if entry else None


def summarize(path: str | Path) -> AdapterSummary:
    """Read an adapter's folder, or a checkpoint's, or an adapter's GGUF file.

    Raises:
        AdapterError: when there is no adapter, or it is broken.
        GGUFError: when a file is no adapter in GGUF, or is broken.
    """
    if Path(path).is_file():
        return _summarize_file(Path(path))
    found = find_adapter(path)
    assert found is not None
    folder = AdapterFolder.open(found)
    details = dict(folder.details or {})
    modules = details.pop(MODULES, {})
    return AdapterSummary(
        folder=folder.path,
        ranks={module: folder.rank(module) for module in folder.keys},
        bytes=folder.weights.stat().st_size,
        factor_bits=folder.factor_bits,
        details=details,
        modules=modules,
    )


def _summarize_file(path: Path) -> AdapterSummary:
    lora = read_lora_header(path)
    details = dict(lora.details)
    modules = details.pop(MODULES, {})
    return AdapterSummary(
        folder=path,
        ranks=lora.ranks,
        bytes=path.stat().st_size,
        factor_bits=lora.factor_bits,
        details=details,
        modules=modules if isinstance(modules, dict) else {},
    )
