"""The packed weights of a checkpoint in GPTQ's layout, read from its files module by module."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .names import QUANTIZE_CONFIG
from .packed_weights import WORD_BITS, PackedWeight

# `checkpoint_format` of GPTQ's two layouts → whether zero points are stored less one.
FORMATS = {"gptq": True, "gptq_v2": False}


def checkpoint_format(folder: Path) -> Any:
    """The format that a folder's quantize_config.json names; None where it names none, or there is no such file."""
    path = folder / QUANTIZE_CONFIG
    content: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content.get("checkpoint_format") or content.get("format") if isinstance(content, dict) else None


def packed_weights(folder: Path, stack: ExitStack, zero_minus_one: bool) -> dict[str, Callable[[], PackedWeight]]:
    """What reads the packed weight of each module, by its full name.

    Args:
        folder: the checkpoint's.
        stack: keeps its files open.
        zero_minus_one: as `FORMATS` says of its format.

    Returns:
        Full module name → reader, which raises `LayoutError` for tensors that do not fit each other.
    """
    found: dict[str, Callable[[], PackedWeight]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        handle = stack.enter_context(safe_open(path, framework="pt"))
        for key in handle.keys():  # noqa: SIM118, the handle is no mapping
            if key.endswith(".qweight"):
                name = key.removesuffix(".qweight")
                found[name] = partial(_read, handle, name, zero_minus_one)
    return found


def _read(handle: Any, name: str, zero_minus_one: bool) -> PackedWeight:
    qweight, qzeros, scales, g_idx = (
        handle.get_tensor(f"{name}.{one}") for one in ("qweight", "qzeros", "scales", "g_idx")
    )
    in_features, out_features = len(g_idx), qweight.shape[1]
    group_size = -(-in_features // scales.shape[0])
    bits = round(qweight.shape[0] * WORD_BITS / in_features)
    return PackedWeight(
        qweight, qzeros, scales, g_idx, bits, group_size, in_features, out_features, zero_minus_one, name
    )
