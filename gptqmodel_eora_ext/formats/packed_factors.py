"""Adapters with factors in 8 or 4 bits, on disk. They need this plugin: `eora export --peft` makes a plain copy.

adapter_config.json         peft_type EORA, which PEFT refuses, since it would ignore the packed tensors silently;
                            r, rank_pattern and the rest as in a LoraConfig; factor_bits, factor_group_size
adapter_model.safetensors   base_model.model.<module>.lora_A.qweight  uint8, rank × ceil(in · bits / 8)
                            base_model.model.<module>.lora_A.scales   float16, rank × ceil(in / factor_group_size)
                            base_model.model.<module>.lora_B.…        the same of Bᵀ, out in place of in
                            metadata "features": {"<module>": [in, out]} as JSON

Row r of both is component r. 8 bits: a code a byte, two's complement. 4 bits: code + 8, the even feature in the low
half of a byte. value = code · scale of the feature's group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open

from .factors import DAMAGED_ADAPTER, GROUP_SIZE, QuantizedFactor, check_packed
from .packed_weights import LayoutError

PACKED_TYPE = "EORA"
FEATURES = "features"


def packed_config(lora_config: Mapping[str, Any], factor_bits: int) -> dict[str, Any]:
    """What `adapter_config.json` says, from the LoraConfig of the same adapter in 16 bits."""
    kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "task_type",
            "base_model_name_or_path", "inference_mode")  # fmt: skip
    return {
        "peft_type": PACKED_TYPE,
        "factor_bits": factor_bits,
        "factor_group_size": GROUP_SIZE,
        **{name: lora_config[name] for name in kept if name in lora_config},
    }


def packed_tensors(prefix: str, packed: tuple[QuantizedFactor, QuantizedFactor]) -> dict[str, torch.Tensor]:
    """The four tensors of a module; ``prefix`` is its key up to `lora_A`."""
    tensors = {}
    for half, factor in zip(("lora_A", "lora_B"), packed, strict=True):
        tensors[f"{prefix}.{half}.qweight"] = factor.codes.cpu().contiguous()
        tensors[f"{prefix}.{half}.scales"] = factor.scales.cpu().contiguous()
    return tensors


def features_metadata(packed: Mapping[str, tuple[QuantizedFactor, QuantizedFactor]]) -> str:
    """Widths of each module's factors, for the file's metadata: four bits cannot tell 7 features from 8."""
    return json.dumps({name: [factor.features for factor in pair] for name, pair in packed.items()})


def read_packed(
    handle: safe_open, keys: Mapping[str, str], features: tuple[int, int], bits: int, name: str = "factors"
) -> tuple[QuantizedFactor, QuantizedFactor]:
    """A (rank × in) and Bᵀ (rank × out) of a module.

    The header's shapes and dtypes are checked before a tensor is read, so that no number of the header makes this
    allocate anything.

    Args:
        handle: the open file.
        keys: "lora_A.qweight" and so on → key in the file.
        features: (in, out).
        bits: 8 or 4.
        name: the module and its file, for messages.

    Raises:
        LayoutError: when a tensor has another shape or dtype than these numbers say, or A and B differ in rank.
    """
    found = []
    for half, width in zip(("lora_A", "lora_B"), features, strict=True):
        codes, scales = keys[f"{half}.qweight"], keys[f"{half}.scales"]
        check_packed(f"{name}, {half}", bits, width, _layout(handle, codes), _layout(handle, scales))
        # Copies, since what the file gives is a part of its mapping (`AdapterFolder` tells why that is let go).
        found.append(QuantizedFactor(handle.get_tensor(codes).clone(), handle.get_tensor(scales).clone(), bits, width))
    lora_A, lora_B = found
    if lora_A.codes.shape[0] != lora_B.codes.shape[0]:
        raise LayoutError(
            f"{name}: A has rank {lora_A.codes.shape[0]} and B rank {lora_B.codes.shape[0]}; both should be the same. "
            f"{DAMAGED_ADAPTER}"
        )
    return lora_A, lora_B


# The names that safetensors gives to the dtypes of packed factors.
_DTYPES = {"U8": torch.uint8, "F16": torch.float16}


def _layout(handle: safe_open, key: str) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a tensor by the file's header; the file's name of a dtype that packed factors never have."""
    header = handle.get_slice(key)
    dtype = header.get_dtype()
    return tuple(header.get_shape()), _DTYPES.get(dtype, dtype)
