"""Bytes on disk."""

from __future__ import annotations

from pathlib import Path


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
