"""Public-domain texts that come with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def demo_text(name: str) -> Path:
    """`calibration` or `heldout`: novels, of which calibration and evaluation see different ones."""
    return Path(str(files(__package__) / "text" / f"{name}.txt"))
