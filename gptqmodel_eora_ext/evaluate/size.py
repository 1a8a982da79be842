"""Bytes on disk."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from ..formats.sizes import ModuleShape

# What a quantised module stores beside `qweight`, in the GPTQ and AWQ formats. GPTQ's column index, `g_idx`, is not
# counted in bits per weight, as plans do not: 4 bytes an input, which loaders build anew where it is missing.
COUNTED = ("qweight", "qzeros", "scales")
WORD_BITS = 32
# Bytes of a value by safetensors' names.
VALUE_BYTES = {"I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I16": 2, "U8": 1, "I8": 1}


def weight_bytes(folder: str | Path) -> int:
    """Bytes of the safetensors files of a model's or an adapter's folder, folders below it left out."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def readable(count: int) -> str:
    """`12345678` → `12.3 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


@dataclass(frozen=True)
class StoredModule:
    """A quantised module as a checkpoint stores it.

    Attributes:
        shape: its name, out_features and in_features.
        bits: of a code.
        group_size: inputs per scale.
        nbytes: of codes, scales and zeros.
    """

    shape: ModuleShape
    bits: int
    group_size: int
    nbytes: int


def tensor_headers(folder: str | Path) -> dict[str, tuple[list[int], str]]:
    """Shape and safetensors' name of the dtype of every tensor in a folder, read from the files' headers."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118, the handle is no mapping
                one = handle.get_slice(key)
                found[key] = (one.get_shape(), one.get_dtype())
    return found


def tensor_bytes(folder: str | Path, kinds: Collection[str] | None = None) -> int:
    """Bytes of the tensors in a folder, the headers of their files left out: what sizes of plans and budgets count.

    Args:
        folder: a model's or an adapter's; folders below it are left out.
        kinds: last parts of the names of those that count, for instance `COUNTED`; None for all.
    """
    found = tensor_headers(folder).items()
    return sum(_bytes(*header) for name, header in found if kinds is None or name.rsplit(".", 1)[-1] in kinds)


def stored_modules(checkpoint: str | Path) -> list[StoredModule]:
    """The quantised modules of a checkpoint in the GPTQ format or AutoRound's packings of it, by name.

    Widths and sizes come from the tensors themselves, so that mixes are told as they are. Empty for other formats:
    without `g_idx` nothing in the headers tells their bits.
    """
    headers = tensor_headers(checkpoint)
    found = []
    for name in sorted(key.removesuffix(".qweight") for key in headers if key.endswith(".qweight")):
        if f"{name}.g_idx" not in headers or f"{name}.scales" not in headers:
            continue
        words, out_features = headers[f"{name}.qweight"][0]
        in_features = headers[f"{name}.g_idx"][0][0]
        parts = [headers[key] for kind in COUNTED if (key := f"{name}.{kind}") in headers]
        found.append(
            StoredModule(
                ModuleShape(name, out_features, in_features),
                round(words * WORD_BITS / in_features),
                -(-in_features // headers[f"{name}.scales"][0][0]),
                sum(_bytes(shape, dtype) for shape, dtype in parts),
            )
        )
    return found


def _bytes(shape: list[int], dtype: str) -> int:
    count = VALUE_BYTES[dtype]
    for side in shape:
        count *= side
    return count
