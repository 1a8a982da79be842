"""Weights are looked through before a loop of hours: one NaN would end it, or make every layer after it worthless."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from ..plan.checkpoint import sampled_rows
from ..system.files import parts_digest
from ..system.spill import bytes_of

# So many values are looked at together, for which the result of `isfinite` takes 16 MB.
VALUES_AT_ONCE = 1 << 24
# A tensor's rows that its fingerprint reads, evenly from the first to the last: a model of 70 billion weights is told
# from its fine-tuned sister within seconds, where reading all of it would take minutes.
FINGERPRINT_ROWS = 3
# The same for a file of another format: 64 MB in all, some of every tensor of a usual model.
FINGERPRINT_PARTS = 1024


def check_weights(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse weights that hold NaN or infinity.

    Args:
        named: pairs of full name and tensor; those on the meta device and those of integers are passed over.

    Raises:
        ValueError: naming the first that holds NaN or infinity, and where.
    """
    for name, weight in named:
        if weight.is_meta or not weight.is_floating_point():
            continue
        flat = weight.detach().reshape(-1)
        for start in range(0, flat.numel(), VALUES_AT_ONCE):
            some = flat[start : start + VALUES_AT_ONCE]
            # `isfinite` does not know the 8-bit floating types.
            finite = torch.isfinite(some.to(torch.float32) if some.element_size() == 1 else some)
            if bool(finite.all()):
                continue
            first = start + int((~finite).nonzero()[0])
            index = [int(one) for one in torch.unravel_index(torch.tensor(first), weight.shape)]
            raise ValueError(
                f"EoRA: {name} holds {float(flat[first])} at {index}. The model's files are damaged, or it was saved "
                f"after a training that diverged; get them again, or mend that weight."
            )


def check_weight_files(folder: Path) -> None:
    """As `check_weights`, for all weights in a folder's safetensors files; one tensor is in memory at a time.

    Other files (pickles) are not opened.

    Raises:
        ValueError: as `check_weights`.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            # Masks and other buffers may hold infinities on purpose.
            check_weights((key, file.get_tensor(key)) for key in file.keys() if key.endswith(".weight"))  # noqa: SIM118


def weights_fingerprint(folder: Path) -> str:
    """A digest of some rows of every weight in a folder's safetensors files, by which one model is told from another.

    Where there are none, one of parts of all its files.
    """
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                part = file.get_slice(key)
                shape = part.get_shape()
                digest.update(f"{key} {tuple(shape)} {part.get_dtype()}".encode())
                some = [part[place : place + 1] for place in sampled_rows(shape, FINGERPRINT_ROWS)] if shape else []
                for rows in some or [file.get_tensor(key)]:
                    digest.update(bytes_of(rows.contiguous()))
    for path in () if files else sorted(folder.iterdir()):
        if path.is_file():
            digest.update(f"{path.name} {file_fingerprint(path)}".encode())
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """A digest of some parts of a file, evenly from its beginning to its end, and of its size."""
    return parts_digest(path, FINGERPRINT_PARTS)
