"""A copy of a GGUF file with other tensors in some places: metadata is copied byte by byte, tensors one at a time."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...system.files import replaced_file, require_space
from . import Q2_0, Q2_0_NUMBER, GGUFError, gguf_package
from .header import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, Header, TensorInfo

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Replacement:
    """What stands in a tensor's place.

    Attributes:
        type: of ggml.
        nbytes: its size.
        values: makes its bytes, uint8, when they are written.
    """

    type: str
    nbytes: int
    values: Callable[[], np.ndarray]


def rewrite(source: Header, path: Path, replaced: Mapping[str, Replacement], file_type: int) -> None:
    """Write a copy in one step; an older file in its place stays whole until then.

    Args:
        source: of a file that is not split.
        path: to write, another file.
        replaced: name of a tensor → what stands in its place, in the same shape.
        file_type: llama.cpp's number for the type of most tensors, where the file tells one.

    Raises:
        GGUFError: for a name that the file does not hold, or a tensor of another size than announced.
        OSError: when there is no room.
    """
    unknown = next((name for name in replaced if name not in source.tensors), None)
    if unknown is not None:
        raise GGUFError(f"`{source.path}` holds no tensor {unknown}.")
    alignment = source.fields.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    entries = b""
    offset = 0
    for name, info in source.tensors.items():
        kind = replaced[name].type if name in replaced else info.type
        entries += _entry(info, kind, offset)
        offset += _aligned(_size(info, replaced), alignment)
    require_space(path, offset)
    with source.path.open("rb") as original, replaced_file(path) as fresh, fresh.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", 3, len(source.tensors), source.entries))
        file.write(_metadata(source, original, file_type))
        file.write(entries)
        _pad(file, alignment)
        for name, info in source.tensors.items():
            if name in replaced:
                values = replaced[name].values()
                if values.nbytes != replaced[name].nbytes:
                    raise GGUFError(f"{name} has {values.nbytes} bytes, {replaced[name].nbytes} were announced.")
                file.write(values.tobytes())
            else:
                _copy(original, info, file)
            _pad(file, alignment)


def _size(info: TensorInfo, replaced: Mapping[str, Replacement]) -> int:
    return replaced[info.name].nbytes if info.name in replaced else info.nbytes


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _entry(info: TensorInfo, kind: str, offset: int) -> bytes:
    name = info.name.encode()
    number = Q2_0_NUMBER if kind == Q2_0 else int(gguf_package().GGMLQuantizationType[kind])
    dimensions = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape[::-1])
    return struct.pack("<Q", len(name)) + name + dimensions + struct.pack("<IQ", number, offset)


def _metadata(source: Header, original: BinaryIO, file_type: int) -> bytes:
    start, end = source.metadata
    original.seek(start)
    copied = bytearray(original.read(end - start))
    if source.file_type is not None:
        struct.pack_into("<I", copied, source.file_type - start, file_type)
    return bytes(copied)


def _copy(original: BinaryIO, info: TensorInfo, file: BinaryIO) -> None:
    original.seek(info.offset)
    left = info.nbytes
    while left:
        chunk = original.read(min(left, CHUNK_BYTES))
        file.write(chunk)
        left -= len(chunk)
