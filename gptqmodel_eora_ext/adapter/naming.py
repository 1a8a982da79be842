"""A checkpoint's `quantize_config.json` names its adapter, so that loading the checkpoint finds it.

GPTQModel reads ``"adapter": {"name": "lora", "path": "eora", "rank": r}`` there. AutoRound and transformers do not read
that file, so a checkpoint that AutoRound made gets one, in GPTQModel's terms, beside its own `config.json`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..formats import autoround
from ..formats.names import QUANTIZE_CONFIG
from ..system.files import write_json
from .factors import ModuleFactors
from .save import most_common_rank

log = logging.getLogger(__name__)

# The adapter's folder inside a checkpoint, where the user names no other.
DEFAULT_FOLDER = "eora"


def name_adapter(checkpoint: Path, folder: Path, factors: Mapping[str, ModuleFactors]) -> None:
    """Write the adapter's place into the checkpoint's `quantize_config.json`, if it is inside the checkpoint.

    A checkpoint in 16 bits (AutoRound's format `fake`) has no place for a name.

    Args:
        checkpoint: its folder.
        folder: the adapter's.
        factors: full module name → factors.
    """
    inside, outside = folder.resolve(), checkpoint.resolve()
    if not inside.is_relative_to(outside):
        log.warning("EoRA: the adapter is in `%s`, outside the checkpoint `%s`, which therefore cannot name it. "
                    "Load it with GPTQModel.load(%r, adapter=EoRA(path=%r)).",
                    folder, checkpoint, str(checkpoint), str(folder))  # fmt: skip
        return
    path = checkpoint / QUANTIZE_CONFIG
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
    elif autoround.read_config(checkpoint) is None:
        log.warning("EoRA: `%s` has no %s to name the adapter in. Load it with adapter=EoRA(path=%r).",
                    checkpoint, QUANTIZE_CONFIG, str(folder))  # fmt: skip
        return
    elif autoround.holds_packed_weights(checkpoint):
        content = autoround.quantize_config(checkpoint)
    else:
        return
    write_json(path, {**content, "adapter": adapter_entry(inside.relative_to(outside).as_posix(), factors)})


def adapter_entry(place: str, factors: Mapping[str, ModuleFactors]) -> dict[str, Any]:
    """What a checkpoint's `quantize_config.json` says of its adapter.

    Packed factors are named `eora`, which GPTQModel without the plugin refuses instead of misreading.

    Args:
        place: the adapter's folder, relative to the checkpoint.
        factors: full module name → factors.
    """
    name = "eora" if any(one.packed for one in factors.values()) else "lora"
    return {"name": name, "path": place, "rank": most_common_rank(factors)}
