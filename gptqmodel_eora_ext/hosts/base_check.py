"""Whether a full-precision model is the one that a checkpoint was quantised from, by comparing the files of both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

# Both are stored in 16 bits; a copy in another 16-bit type differs by a rounding.
TOLERANCE = 2**-7
# Parts of an embedding that are compared, and rows of each: a fine-tuned sibling moves most rows.
PARTS = 16
PART_ROWS = 8
# Ŵ and W agree to at least this cosine. Signs alone give √(2/π) = 0.8, more bits more; half of Gaussian weights, the
# larger ones, 0.96, and a twentieth of them 0.53. Matrices that have nothing to do with each other give 0, to within a
# hundredth.
LEAST_AGREEMENT = 0.5


def check_embeddings(checkpoint: Path, base: Path, named: str) -> None:
    """Compare the embeddings, which no quantiser touches. Where none is found in the files of both, nothing is checked.

    Args:
        checkpoint: folder of the quantised model.
        base: folder of the full-precision model.
        named: what the user called it.

    Raises:
        ValueError: when the embeddings differ.
    """
    for name, ours, theirs in _shared(checkpoint, base, dimensions=2):
        if "embed" not in name and not name.endswith("wte.weight"):
            continue
        if ours.shape != theirs.shape:
            how = f"{tuple(ours.shape)} there, {tuple(theirs.shape)} in the checkpoint"
        elif (gap := _gap(ours, theirs)) > TOLERANCE:
            how = f"they differ by {gap:.1%}, expected at most {TOLERANCE:.1%}"
        else:
            continue
        raise ValueError(
            f"EoRA: `{named}` is not the model that `{checkpoint}` was quantised from: {name}: {how}. "
            f"Name the full-precision base of the checkpoint."
        )


def scales_were_moved(checkpoint: Path, base: Path) -> bool:
    """Whether a quantiser has moved scales between layers (AWQ), which changes norms."""
    return any(_gap(ours, theirs) > TOLERANCE for _, ours, theirs in _shared(checkpoint, base, dimensions=1)
               if ours.shape == theirs.shape)  # fmt: skip


def _gap(native: torch.Tensor, stored: torch.Tensor) -> float:
    native, stored = native.to(torch.float32), stored.to(torch.float32)
    return float((native - stored).norm() / native.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _shared(checkpoint: Path, base: Path, *, dimensions: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (name, the base's, the checkpoint's) of weights that both store under one name; of large ones some rows."""
    places = {key: path for path in sorted(base.glob("*.safetensors")) for key in _keys(path)}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key in places and key.endswith(".weight") and len(file.get_slice(key).get_shape()) == dimensions:
                    with safe_open(places[key], framework="pt") as native:
                        yield key, _some(native, key), _some(file, key)


def _keys(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _some(file: safe_open, key: str) -> torch.Tensor:
    part = file.get_slice(key)
    rows = part.get_shape()[0]
    if len(part.get_shape()) == 1 or rows <= PARTS * PART_ROWS:
        return part[:]
    starts = [index * (rows - PART_ROWS) // (PARTS - 1) for index in range(PARTS)]
    return torch.cat([part[start : start + PART_ROWS] for start in starts])


def agreement(found: torch.Tensor, weight: torch.Tensor) -> float:
    """Cosine of two matrices, of −1 to 1; 0 where one of them is zero."""
    scale = float(found.double().norm() * weight.double().norm())
    return float((found.double() * weight.double()).sum()) / scale if scale > 0 else 0.0
