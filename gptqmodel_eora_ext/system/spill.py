"""Tensors kept for later: in memory up to a limit, beyond it on disk, the same bits either way."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch


@dataclass(frozen=True)
class Kept:
    """A tensor that a `Spill` keeps.

    Attributes:
        tensor: the tensor, on the CPU; None where it is on disk.
        offset: where its bytes begin in the file.
        shape: of the tensor.
        dtype: of the tensor.
    """

    tensor: torch.Tensor | None
    offset: int
    shape: torch.Size
    dtype: torch.dtype


class Spill:
    """Keeps tensors in memory while they take at most ``limit`` bytes, and the others in a file without a name.

    The system removes such a file when the process ends, however it ends. Only one thread at a time may use a `Spill`.

    Args:
        limit: bytes that may be in memory.
        folder: where the file is made, once there is something for it; made if it is missing.

    Attributes:
        in_memory: bytes that are kept in memory now.
        on_disk: bytes that were written to the file.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit = limit
        self.folder = folder
        self.in_memory = 0
        self.on_disk = 0
        self._file: IO[bytes] | None = None

    def keep(self, tensor: torch.Tensor) -> Kept:
        """Keep a copy of a tensor of any device and dtype.

        Raises:
            OSError: when the disk is full.
        """
        flat = tensor.detach().to("cpu", copy=True).contiguous()
        if self.in_memory + flat.nbytes <= self.limit:
            self.in_memory += flat.nbytes
            return Kept(flat, 0, flat.shape, flat.dtype)
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
        kept = Kept(None, self.on_disk, flat.shape, flat.dtype)
        self._file.seek(kept.offset)
        self._file.write(bytes_of(flat))
        self.on_disk += flat.nbytes
        return kept

    def read(self, kept: Kept, device: torch.device | str = "cpu") -> torch.Tensor:
        """Give back a tensor that is kept, on ``device``. One that is in memory and there already is not copied.

        Raises:
            OSError: when the file is shorter than what was written to it.
        """
        if kept.tensor is not None:
            return kept.tensor.to(device)
        assert self._file is not None
        tensor = torch.empty(kept.shape, dtype=kept.dtype)
        self._file.seek(kept.offset)
        found = self._file.readinto(bytes_of(tensor))  # type: ignore[attr-defined]
        if found != tensor.nbytes:
            raise OSError(f"EoRA: {found} of {tensor.nbytes} bytes could be read back in `{self.folder}`.")
        return tensor.to(device)

    def drop(self, kept: Kept) -> None:
        """Count a tensor's bytes in memory as free. The caller must not use ``kept`` any more."""
        if kept.tensor is not None:
            self.in_memory -= kept.tensor.nbytes

    def close(self) -> None:
        """Close the file, which removes it."""
        if self._file is not None:
            self._file.close()
            self._file = None


@contextmanager
def spilling(limit: int, folder: Path) -> Iterator[Spill]:
    """Yield a `Spill`, and close it when the block ends."""
    spill = Spill(limit, folder)
    try:
        yield spill
    finally:
        spill.close()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, not a copy."""
    # As bytes, since numpy has no bfloat16.
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
