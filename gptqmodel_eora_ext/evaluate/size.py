"""Bytes on disk."""

from __future__ import annotations

from pathlib import Path


def weight_bytes(folder: str | Path, *, adapters: bool = False) -> int:
    """Bytes of the safetensors files of a model's folder.

    Args:
        folder: the model.
        adapters: count the files in folders below it too.
    """
    pattern = "**/*.safetensors" if adapters else "*.safetensors"
    return sum(path.stat().st_size for path in Path(folder).glob(pattern))


def readable(count: int) -> str:
    """`12345678` → `12.3 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
