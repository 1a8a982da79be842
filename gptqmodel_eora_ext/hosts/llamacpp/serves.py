"""What llama.cpp's files are served with, for the commands and the evaluation (`hosts.registry`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...formats.gguf.header import is_gguf
from ..jobs import AdapterJob, Exported, ExportJob, FileRefiner, ImatrixJob, TypePlanJob, TypePlanned
from .base import unpacked_base
from .export import export
from .generate import generate_adapter
from .imatrix import measure_imatrix
from .plan import NAME, plan_types
from .refine import refine_gguf

SUFFIX = ".gguf"


def adapter_maker(checkpoint: Path) -> Callable[[AdapterJob], Path] | None:
    """GGUF files, by their first bytes or by their name."""
    return generate_adapter if _is_ours(checkpoint) else None


def file_refiner(model: Path) -> FileRefiner | None:
    """GGUF files, as above."""
    return refine_gguf if _is_ours(model) else None


def base_folder(base: Path) -> Callable[[Path], str] | None:
    """GGUF files, as above."""
    return unpacked_base if _is_ours(base) else None


def imatrix_maker(model: Path) -> Callable[[ImatrixJob], int] | None:
    """GGUF files, as above."""
    return measure_imatrix if _is_ours(model) else None


def exporter(like: Path) -> Callable[[ExportJob], Exported] | None:
    """GGUF files, as above."""
    return export if _is_ours(like) else None


def type_planner(host: str) -> Callable[[TypePlanJob], TypePlanned] | None:
    """Types of ggml for `llama-quantize`."""
    return plan_types if host == NAME else None


def _is_ours(path: Path) -> bool:
    return is_gguf(path) or (path.is_file() and path.suffix == SUFFIX)
