"""What llama.cpp's files are served with, for the commands and the evaluation (`hosts.registry`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...formats.gguf.header import is_gguf
from ..registry import AdapterJob
from .generate import generate_adapter

SUFFIX = ".gguf"


def adapter_maker(checkpoint: Path) -> Callable[[AdapterJob], Path] | None:
    """GGUF files, by their first bytes or by their name."""
    return generate_adapter if is_gguf(checkpoint) or (checkpoint.is_file() and checkpoint.suffix == SUFFIX) else None
