"""What transformers loads by itself is served with, for the commands and the evaluation (`hosts.registry`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...formats.names import MODEL_CONFIG, QUANTIZE_CONFIG
from ..jobs import AdapterJob, Loader
from .generate import generate_adapter
from .load import load
from .reader import quant_method

# `quant_method` of checkpoints that GPTQModel opens, with kernels that take an adapter; AutoRound's among them.
OF_GPTQMODEL = ("gptq", "awq", "auto-round", "auto_round", "intel/auto-round")


def adapter_maker(checkpoint: Path) -> Callable[[AdapterJob], Path] | None:
    """Folders of models whose weights were changed, or that are quantised in formats of other tools than GPTQModel."""
    return generate_adapter if _is_ours(checkpoint) else None


def loader(checkpoint: Path) -> Loader | None:
    """The same."""
    return load if _is_ours(checkpoint) else None


def _is_ours(checkpoint: Path) -> bool:
    if not (checkpoint / MODEL_CONFIG).is_file() or (checkpoint / QUANTIZE_CONFIG).is_file():
        return False
    return quant_method(checkpoint) not in OF_GPTQMODEL
