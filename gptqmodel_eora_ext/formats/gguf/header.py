"""The header of a GGUF file: metadata, and where each tensor lies.

Nothing that a header says is believed before it is checked against the size of the file, so that no number in a hostile
file makes this allocate memory or count to 2⁶⁴. Long arrays (a vocabulary) are passed over, not read.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import Q2_0, Q2_0_BLOCK, Q2_0_BYTES, Q2_0_NUMBER, GGUFError, gguf_package

MAGIC = b"GGUF"
# Version 1 has 32-bit counts and was in use for some weeks of 2023; 2 and 3 differ only in that 3 may be big-endian.
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
FILE_TYPE_KEY, UINT32 = "general.file_type", 4
# Value types by their numbers in the file: what `struct` calls them. 8 is a string and 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Arrays of numbers up to this length are kept (head counts of each layer, lengths of rotary sections); others not.
KEPT_ARRAY = 4096
# ggml's own limits.
MOST_DIMENSIONS = 4
# The least bytes of an entry: a key of no letters, its type and a byte; a name of no letters, one dimension, type and
# offset.
LEAST_KEY, LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
REMEDY = "Download or convert it again."


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file.

    Attributes:
        name: as in the file (`blk.0.attn_q.weight`).
        shape: as torch has it, the fastest dimension last.
        type: name of its type in ggml (`Q2_K`).
        path: the file.
        offset: of its first byte in the file.
        nbytes: its size there.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    path: Path
    offset: int
    nbytes: int

    @property
    def weights(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What stands in front of the tensors' bytes.

    Attributes:
        path: the file.
        fields: metadata: numbers, strings, and short arrays of numbers as tuples; long arrays and arrays of strings are
            left out.
        tensors: name → where it lies.
        metadata: first byte of the metadata in the file, and the one after the last.
        entries: number of entries in it.
        file_type: place of the value of `general.file_type`; None where there is none.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    metadata: tuple[int, int] = (0, 0)
    entries: int = 0
    file_type: int | None = None

    def text(self, key: str) -> str | None:
        """A string of the metadata; None where there is none."""
        value = self.fields.get(key)
        return value if isinstance(value, str) else None

    def whole(self, key: str) -> int | None:
        """An integer of the metadata; None where there is none."""
        value = self.fields.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def architecture(self) -> str:
        """`general.architecture`.

        Raises:
            GGUFError: for a file without.
        """
        found = self.text("general.architecture")
        if not found:
            raise GGUFError(f"`{self.path}`: general.architecture is missing, so its tensors cannot be told. {REMEDY}")
        return found


def is_gguf(path: Path) -> bool:
    """Whether this is a file that begins as GGUF does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Header:
    """Read and check the header of a file.

    Args:
        path: a GGUF file, version 2 or 3, little-endian. It is mapped while this runs, and not read beyond its header.

    Raises:
        GGUFError: for a file of another kind, one that is cut off, or numbers that do not fit it; it names the file,
            what was found, and what would do.
        OSError: when the file cannot be opened.
    """
    size = path.stat().st_size
    if size < 24:
        raise GGUFError(f"`{path}` has {size} bytes, too few for a GGUF file. {REMEDY}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(path, data, size).header()


class _Reader:
    """Walks through a header. `_take` alone moves forward, and never beyond the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path = path
        self._data = data
        self._size = size
        self._place = 0

    def header(self) -> Header:
        if self._take(4) != MAGIC:
            raise GGUFError(f"`{self._path}` begins with {self._data[:4]!r}, not {MAGIC!r}: it is no GGUF file.")
        version = self._number("I")
        if version not in VERSIONS:
            if not version & 0xFFFF:
                raise GGUFError(
                    f"`{self._path}` is big-endian. Convert it on any machine: "
                    f"`gguf-convert-endian {self._path.name} little` (package `gguf`)."
                )
            raise GGUFError(f"`{self._path}` is GGUF version {version}, expected 2 or 3. Convert the model again.")
        count, keys = self._number("Q"), self._number("Q")
        self._check_count("metadata entries", keys, LEAST_KEY)
        fields: dict[str, Any] = {}
        start, file_type = self._place, None
        for _ in range(keys):
            name = self._string("a metadata key")
            if name in fields:
                raise GGUFError(f"`{self._path}` has the metadata `{name}` twice. {REMEDY}")
            kind = self._number("I")
            if name == FILE_TYPE_KEY and kind == UINT32:
                file_type = self._place
            value = self._value(name, kind)
            if value is not None:
                fields[name] = value
        metadata = (start, self._place)
        self._check_count("tensors", count, LEAST_TENSOR)
        entries = [self._entry() for _ in range(count)]
        tensors = self._placed(entries, fields.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT))
        return Header(self._path, fields, tensors, metadata, keys, file_type)

    def _take(self, count: int) -> bytes:
        if count > self._size - self._place:
            raise GGUFError(
                f"`{self._path}` ends within its header: at byte {self._place} {count} bytes are announced and "
                f"{self._size - self._place} are left. {REMEDY}"
            )
        self._place += count
        return self._data[self._place - count : self._place]

    def _skip(self, count: int, what: str) -> None:
        if count > self._size - self._place:
            raise GGUFError(
                f"`{self._path}`: {what} is to take {count} bytes, and {self._size - self._place} are left. {REMEDY}"
            )
        self._place += count

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _string(self, what: str) -> str:
        length = self._number("Q")
        if length > self._size - self._place:
            raise GGUFError(f"`{self._path}`: {what} is to have {length} bytes; the file ends before. {REMEDY}")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise GGUFError(f"`{self._path}`: {what} is no UTF-8. {REMEDY}") from None

    def _check_count(self, what: str, count: int, least: int) -> None:
        if count * least > self._size - self._place:
            raise GGUFError(
                f"`{self._path}` announces {count} {what}, for which its {self._size} bytes have no room. {REMEDY}"
            )

    def _value(self, name: str, kind: int) -> Any:
        """A value of the metadata; None for one that is passed over."""
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string(f"`{name}`")
        if kind != ARRAY:
            raise GGUFError(f"`{self._path}`: `{name}` is of type {kind}, which GGUF does not know. {REMEDY}")
        inner, count = self._number("I"), self._number("Q")
        if inner in SCALARS:
            form = SCALARS[inner]
            if count > KEPT_ARRAY:
                self._skip(count * struct.calcsize(f"<{form}"), f"`{name}`")
                return None
            return tuple(self._number(form) for _ in range(count))
        if inner != STRING:
            # Arrays of arrays are allowed by the format and written by nobody.
            raise GGUFError(f"`{self._path}`: `{name}` is an array of type {inner}, expected numbers or strings.")
        self._check_count(f"strings in `{name}`", count, 8)
        for _ in range(count):
            self._skip(self._number("Q"), f"a string of `{name}`")
        return None

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("a tensor's name")
        dimensions = self._number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise GGUFError(f"`{self._path}`: {name} has {dimensions} dimensions, expected 1 to {MOST_DIMENSIONS}.")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return name, shape[::-1], self._number("I"), self._number("Q")

    def _placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: Any
    ) -> dict[str, TensorInfo]:
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise GGUFError(f"`{self._path}`: {ALIGNMENT_KEY} is {alignment!r}, expected a power of two. {REMEDY}")
        start = -(-self._place // alignment) * alignment
        found: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            label, nbytes = self._type_and_size(name, shape, kind)
            if offset % alignment:
                raise GGUFError(f"`{self._path}`: {name} lies at {offset}, no multiple of {alignment}. {REMEDY}")
            if start + offset + nbytes > self._size:
                raise GGUFError(
                    f"`{self._path}` is cut off: {name} ends at byte {start + offset + nbytes}, the file at "
                    f"{self._size}. {REMEDY}"
                )
            if name in found:
                raise GGUFError(f"`{self._path}` holds the tensor {name} twice. {REMEDY}")
            found[name] = TensorInfo(name, shape, label, self._path, start + offset, nbytes)
        return found

    def _type_and_size(self, name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
        gguf = gguf_package()
        try:
            if kind == Q2_0_NUMBER:
                label, block, block_bytes = Q2_0, Q2_0_BLOCK, Q2_0_BYTES
            else:
                label = gguf.GGMLQuantizationType(kind).name
                block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise GGUFError(
                f"`{self._path}`: {name} is of ggml's type number {kind}, which the installed package `gguf` does not "
                f"know. Update `gguf`, or quantise the model to a type that it knows."
            ) from None
        if min(shape) < 1 or shape[-1] % block:
            raise GGUFError(
                f"`{self._path}`: {name} is {' × '.join(map(str, shape))} in {label}, whose rows are cut into "
                f"blocks of {block}. {REMEDY}"
            )
        return label, math.prod(shape) // block * block_bytes
