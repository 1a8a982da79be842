"""AutoRound's checkpoints in GPTQModel's terms. Reads files; needs neither library.

AutoRound packs integers as GPTQ or AWQ do, under names of its own:

| `packing_format` | tensors | zero points |
|---|---|---|
| `auto_round:auto_gptq` (and `auto_gptq` exports) | GPTQ | stored less one: GPTQModel's `gptq` |
| `auto_round`, `auto_round:gptqmodel` | GPTQ | stored as they are: `gptq_v2` |
| `auto_round:auto_awq` (and `auto_awq` exports) | AWQ | `gemm` |

Which modules are packed, in how many bits and in what groups, is read off the tensors, so mixed widths, regular
expressions and layers left in 16 bits need no interpretation.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .names import MODEL_CONFIG

WORD_BITS = 32
METHOD_NAMES = ("auto-round", "auto_round", "intel/auto-round")
PROVIDER = "auto-round"
# Bits that GPTQModel's kernels unpack, by method.
BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
# In the layout that stores zero points less one, a zero point of 0 would wrap around to the largest code. GPTQModel
# opens an asymmetric checkpoint only where the packer is one that never writes such a zero point, and of those it knows
# itself alone, from this version on. AutoRound's packer never writes one either, so its checkpoints name both.
TRUSTED_PACKER = "gptqmodel:0.9.0"
WORKS = (
    "What can be: packed integer weights with 16-bit activations, exported as auto_round, auto_round:auto_gptq, "
    "auto_round:auto_awq, auto_gptq or auto_awq, in 2, 3, 4 or 8 bits (AWQ: 4)."
)


@dataclass(frozen=True)
class Packing:
    """How a checkpoint's integers are laid out.

    Attributes:
        method: "gptq" or "awq".
        format: GPTQModel's name of it: "gptq", "gptq_v2" or "gemm".
    """

    method: str
    format: str


@dataclass(frozen=True)
class PackedModule:
    """A packed linear layer: its width, group size (-1 for a whole row) and shape."""

    bits: int
    group_size: int
    out_features: int
    in_features: int


def read_config(checkpoint: Path) -> dict[str, Any] | None:
    """What AutoRound wrote about a checkpoint's quantisation, or None for a checkpoint that it did not make."""
    path = checkpoint / MODEL_CONFIG
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    return found if isinstance(found, dict) and is_autoround(found) else None


def is_autoround(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is AutoRound's."""
    return str(config.get("quant_method")).lower() in METHOD_NAMES or config.get("provider") == PROVIDER


def packing(config: Mapping[str, Any], where: str) -> Packing:
    """How AutoRound packed a checkpoint.

    Args:
        config: its `quantization_config`.
        where: the checkpoint, for messages.

    Raises:
        NotImplementedError: for anything but packed integers beside 16-bit activations, naming the format.
    """
    name = str(config.get("packing_format") or config.get("backend") or f"auto_{config.get('quant_method')}").lower()
    data_type, act_bits = str(config.get("data_type") or "int"), config.get("act_bits")
    if act_bits is not None and act_bits <= 8:
        raise NotImplementedError(
            f"EoRA: `{where}` is quantised as `{data_type}` with activations in {act_bits} bits "
            f"(`{config.get('act_data_type') or data_type}`, format `{name}`), which cannot be dequantised here. "
            f"{WORKS}"
        )
    words = set(re.split(r"[:\s]", name))
    if data_type != "int" or not words <= {"auto_round", "autoround", "auto_gptq", "gptq", "gptqmodel", "exllamav2",
                                           "exllama", "triton", "auto_awq", "awq", "gemm", "zp"}:  # fmt: skip
        raise NotImplementedError(
            f"EoRA: `{where}` stores `{data_type}` weights in the format `{name}`, which cannot be dequantised here. "
            f"{WORKS}"
        )
    if words & {"auto_awq", "awq"}:
        return Packing("awq", "gemm")
    if words & {"auto_gptq", "gptq"}:
        return Packing("gptq", "gptq")
    return Packing("gptq", "gptq_v2")


def quantize_config(checkpoint: Path) -> dict[str, Any]:
    """GPTQModel's `quantize_config.json` for a checkpoint that AutoRound made.

    Raises:
        NotImplementedError: for a format that GPTQModel cannot dequantise.
        ValueError: for a checkpoint without packed modules, or whose tensors do not fit its format.
    """
    config = read_config(checkpoint)
    if config is None:
        raise ValueError(f"EoRA: `{checkpoint}` is no checkpoint of AutoRound.")
    layout = packing(config, str(checkpoint))
    modules = dict(packed_modules(checkpoint, layout))
    if not modules:
        raise ValueError(
            f"EoRA: `{checkpoint}` holds no packed layer. Is the export complete? The `fake` format has none."
        )
    bits, group_size = Counter((one.bits, one.group_size) for one in modules.values()).most_common(1)[0][0]
    dynamic: dict[str, dict[str, Any]] = {}
    for name, module in modules.items():
        if (module.bits, module.group_size) != (bits, group_size):
            dynamic[f"+:^{re.escape(name)}$"] = {"bits": module.bits, "group_size": module.group_size}
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in plain_matrices(checkpoint)}
    return {
        "bits": bits,
        "group_size": group_size,
        "sym": bool(config.get("sym", True)),
        "desc_act": False,
        "lm_head": any(name.rsplit(".", 1)[-1] == "lm_head" for name in modules),
        "method": layout.method,
        "format": layout.format,
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "meta": {"quantizer": [f"auto-round:{config.get('autoround_version', 'unknown')}", TRUSTED_PACKER]},
    }


def packed_modules(checkpoint: Path, layout: Packing) -> Iterator[tuple[str, PackedModule]]:
    """Yield (name, width and groups) of each packed linear layer.

    Raises:
        NotImplementedError: for a width that GPTQModel does not unpack.
        ValueError: for tensors that do not fit the format.
    """
    shapes = tensor_shapes(checkpoint)
    for key, (rows, columns) in ((key, shape) for key, shape in shapes.items() if key.endswith(".qweight")):
        name = key.removesuffix(".qweight")
        scales = shapes.get(f"{name}.scales")
        if scales is None or len(scales) != 2:
            raise ValueError(f"EoRA: {name} in `{checkpoint}` has a qweight but no scales. Export the model again.")
        groups, out_features = scales
        if layout.method == "awq":
            in_features, bits = float(rows), columns * WORD_BITS / out_features
        else:
            zeros = shapes.get(f"{name}.qzeros", (0, 0))[1]
            bits = zeros * WORD_BITS / out_features
            in_features = rows * WORD_BITS / bits if bits else 0
        if bits not in BITS[layout.method]:
            raise NotImplementedError(
                f"EoRA: {name} in `{checkpoint}` is packed in {bits:g} bits as {layout.method.upper()}. {WORKS}"
            )
        yield name, PackedModule(int(bits), group_size_of(int(in_features), groups), out_features, int(in_features))


def group_size_of(in_features: int, groups: int) -> int:
    """Inputs per scale, −1 for a whole row, by the number of scales that a row has."""
    if groups == 1:
        return -1
    # The last group may be shorter; sizes are powers of two or divide the width.
    size = -(-in_features // groups)
    return size if in_features % groups == 0 else 1 << (size - 1).bit_length()


def holds_packed_weights(checkpoint: Path) -> bool:
    """Whether a checkpoint has any packed layer; one in 16 bits (`fake`) has none."""
    return any(key.endswith(".qweight") for key in tensor_shapes(checkpoint))


def plain_matrices(checkpoint: Path) -> list[str]:
    """Modules that keep a matrix in 16 bits: linear layers that were left alone, embeddings."""
    return [
        key.removesuffix(".weight")
        for key, shape in tensor_shapes(checkpoint).items()
        if key.endswith(".weight") and len(shape) == 2
    ]


def tensor_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from the headers of the checkpoint's safetensors files.

    Raises:
        ValueError: for a broken file, or none.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    shapes[key] = tuple(file.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"EoRA: `{path}` is truncated or corrupted ({error}). Export the model again.") from error
    if not shapes:
        raise ValueError(f"EoRA: `{checkpoint}` holds no safetensors file.")
    return shapes
