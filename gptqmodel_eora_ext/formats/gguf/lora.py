"""Adapters in GGUF, as llama.cpp's `--lora` takes them: for each tensor T of the model `T.lora_a` and `T.lora_b`.

`lora_a` is A, rank × in, and `lora_b` is B, out × rank. llama.cpp adds s · B A x, with s = scale · alpha / rank, or the
user's scale alone where `adapter.lora.alpha` is 0. So alpha is 0 here, and every rank has the scale 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..factors import QuantizedFactor
from . import GGUFError, gguf_package
from .blocks import TYPES, from_blocks, to_blocks
from .header import Header, TensorInfo, read_header
from .model import read_tensor
from .writing import written

SUFFIX_A, SUFFIX_B = ".lora_a", ".lora_b"
# Metadata of our own: what was measured, as JSON. llama.cpp reads over it.
DETAILS_KEY = "eora.details"
ALPHA_KEY = "adapter.lora.alpha"
# Types of factors that are no integers.
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}

Factor = torch.Tensor | QuantizedFactor


@dataclass(frozen=True)
class LoraPair:
    """The factors of one tensor.

    Attributes:
        lora_A: rank × in, floating or in integers; of a tensor of experts one for each, experts × rank × in.
        lora_B: out × rank, likewise.
    """

    lora_A: Factor | list[QuantizedFactor]
    lora_B: Factor | list[QuantizedFactor]


def write_lora(
    path: Path, architecture: str, pairs: Mapping[str, LoraPair], *, name: str, details: Mapping[str, Any]
) -> None:
    """Write an adapter in one step; an older file in its place stays whole until then.

    Args:
        path: the file.
        architecture: `general.architecture` of the model, which llama.cpp compares.
        pairs: name of the model's tensor (`blk.0.attn_q.weight`) → its factors. Floating ones are stored in float16.
        name: `general.name`.
        details: what goes into the file as JSON.

    Raises:
        GGUFError: when there are no factors, or a value does not fit float16.
    """
    gguf = gguf_package()
    if not pairs:
        raise GGUFError(f"there is nothing to write into `{path}`: no module has factors.")
    with written(path, architecture) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        writer.add_string(DETAILS_KEY, json.dumps(details))
        for tensor, pair in pairs.items():
            for suffix, factor in ((SUFFIX_A, pair.lora_A), (SUFFIX_B, pair.lora_B)):
                values, kind = _stored(factor, f"{tensor}{suffix}")
                raw = gguf.GGMLQuantizationType[kind] if kind in TYPES.values() else None
                writer.add_tensor(f"{tensor}{suffix}", values, raw_dtype=raw)


def _stored(factor: Factor | list[QuantizedFactor], name: str) -> tuple[np.ndarray, str]:
    if isinstance(factor, list):
        return np.stack([to_blocks(one) for one in factor]), TYPES[factor[0].bits]
    if isinstance(factor, QuantizedFactor):
        return to_blocks(factor), TYPES[factor.bits]
    largest = float(factor.abs().max()) if factor.numel() else 0.0
    if largest > torch.finfo(torch.float16).max:
        raise GGUFError(f"{name} reaches {largest:.3g}, too large for float16.")
    return factor.detach().cpu().to(torch.float16).contiguous().numpy(), "F16"


@dataclass(frozen=True)
class LoraHeader:
    """What an adapter's file says without its values.

    Attributes:
        header: the file's.
        ranks: tensor of the model → rank.
        details: what was written as JSON; empty for an adapter that another tool made.
        factor_bits: 16, 8 or 4 by the type of its first tensor.
    """

    header: Header
    ranks: Mapping[str, int]
    details: Mapping[str, Any]
    factor_bits: int


def read_lora(lora: LoraHeader) -> dict[str, tuple[Factor, Factor]]:
    """The factors of an adapter for matrices, B scaled so that B A is what is added.

    Args:
        lora: of the file, as `read_lora_header` has checked it.

    Returns:
        Name of the model's tensor → A (rank × in) and B (out × rank): in integers as they are stored, others in their
        dtype.

    Raises:
        GGUFError: for factors of experts, or of a type that factors are not stored in.
    """
    alpha = float(lora.header.fields.get(ALPHA_KEY) or 0.0)
    pairs = {}
    for tensor, rank in lora.ranks.items():
        lora_A, lora_B = (_factor(lora.header.tensors[f"{tensor}{suffix}"]) for suffix in (SUFFIX_A, SUFFIX_B))
        pairs[tensor] = (lora_A, _scaled(lora_B, alpha / rank) if alpha else lora_B)
    return pairs


def _factor(info: TensorInfo) -> Factor:
    if len(info.shape) != 2:
        raise GGUFError(f"`{info.path}`: {info.name} has {len(info.shape)} dimensions, expected the 2 of a matrix.")
    if info.type in DTYPES:
        return read_tensor(info).to(DTYPES[info.type])
    bits = next((width for width, kind in TYPES.items() if kind == info.type), None)
    if bits is None:
        raise GGUFError(f"`{info.path}`: {info.name} is of type {info.type}; factors are read of the types "
                        f"{', '.join((*DTYPES, *TYPES.values()))}. Make the adapter again.")  # fmt: skip
    rows, features = info.shape
    data = np.fromfile(info.path, dtype=np.uint8, count=info.nbytes, offset=info.offset)
    return from_blocks(torch.from_numpy(data).view(rows, -1), bits, features)


def _scaled(factor: Factor, scale: float) -> Factor:
    if isinstance(factor, QuantizedFactor):
        return replace(factor, scales=factor.scales * scale)
    return factor * scale


def read_lora_header(path: Path) -> LoraHeader:
    """Read what an adapter's file says.

    Raises:
        GGUFError: for a file that is broken or no adapter, or a factor without its partner.
    """
    header = read_header(path)
    if header.text("general.type") != "adapter":
        raise GGUFError(f"`{path}` is of the kind `{header.text('general.type')}`, expected an adapter.")
    ranks: dict[str, int] = {}
    for name, info in header.tensors.items():
        if name.endswith(SUFFIX_A):
            partner = header.tensors.get(f"{name.removesuffix(SUFFIX_A)}{SUFFIX_B}")
            if partner is None or partner.shape[-1] != info.shape[-2]:
                raise GGUFError(f"`{path}`: {name} has no {SUFFIX_B} of its rank. Make the adapter again.")
            ranks[name.removesuffix(SUFFIX_A)] = info.shape[-2]
    try:
        details = json.loads(header.text(DETAILS_KEY) or "{}")
    except ValueError:
        details = None
    if not isinstance(details, dict):
        raise GGUFError(f"`{path}`: `{DETAILS_KEY}` is no JSON object. Make the adapter again.")
    kinds = {info.type for info in header.tensors.values()}
    bits = next((width for width, kind in TYPES.items() if kind in kinds), 16)
    return LoraHeader(header, ranks, details, bits)
