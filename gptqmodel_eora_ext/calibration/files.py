"""What a file of texts is, told by its content, and its characters in pieces, however large the file.

| the file begins with | it is |
|---|---|
| `1f 8b`, `28 b5 2f fd` | gzip or Zstandard; what is inside is told in the same way |
| `PAR1` | Parquet |
| a byte-order mark | UTF-8 or UTF-16 text; text without one is UTF-8 |
| `{"` or `[{` | JSON: a row a line, an array of rows, or one row over several lines |
| anything else | plain text; CSV or TSV where the name says so, since nothing in the content does |

Other formats that are known by their first bytes are refused by name.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

TEXT, LINES, VALUES, ARRAY, CSV, TSV, PARQUET = (
    "text", "JSON lines", "JSON values", "a JSON array", "CSV", "TSV", "Parquet"
)  # fmt: skip
GZIP, ZSTANDARD = "gzip", "zstd"
COMPRESSIONS = {b"\x1f\x8b": GZIP, b"\x28\xb5\x2f\xfd": ZSTANDARD}
PARQUET_MAGIC = b"PAR1"
# A longer mark stands before one that it begins with.
MARKS = {
    b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}  # fmt: skip
REFUSED = {
    b"PK\x03\x04": "a ZIP archive (also .docx, .xlsx, .npz, .pt)", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf": "a 7-Zip archive", b"\x04\x22\x4d\x18": "lz4", b"Rar!": "a RAR archive", b"%PDF": "PDF",
    b"ARROW1": "Arrow", b"\xff\xff\xff\xff": "an Arrow stream", b"SQLite format 3": "SQLite", b"GGUF": "GGUF",
    b"\x93NUMPY": "NumPy", b"\x89HDF": "HDF5", b"Obj\x01": "Avro", b"ORC": "ORC", b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG", b"\x7fELF": "a program",
    **{bytes([0x80, protocol]): "a pickle" for protocol in range(2, 6)},
}  # fmt: skip
READABLE = "Pass text, JSON, JSON lines, CSV, TSV or Parquet; gzip and Zstandard are read as they are."
# Suffixes that promise rows: such a file is not taken for plain text where its content does not keep the promise.
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
ROW_SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".zst")
TEXT_SUFFIXES = (".txt", ".md")
# Bytes that are read and decoded at a time; what the file is, is told from the first of them.
BLOCK_BYTES = 1 << 18
# Text shrinks 3 to 10 times, the same line over and over some 200 times; a file made to fill the memory, 1000 times and
# more. What has come out of a file is compared with what went in once it is more than fits in memory unnoticed.
MOST_EXPANSION = 400
UNSUSPECTED_BYTES = 1 << 28


class TextError(ValueError):
    """A file of texts cannot be read; the message names the file, the line, and the remedy."""


@dataclass(frozen=True)
class TextFile:
    """A file, and what it is.

    Attributes:
        path: where it lies.
        kind: `TEXT`, `LINES`, `VALUES` (JSON rows one after another), `ARRAY`, `CSV`, `TSV` or `PARQUET`.
        compression: `GZIP`, `ZSTANDARD` or None.
        encoding: of its characters, a name in Python.
    """

    path: Path
    kind: str
    compression: str | None = None
    encoding: str = "utf-8"

    def error(self, message: str, line: int | None = None) -> TextError:
        """An error that names the file and, where it is known, the line."""
        place = "" if line is None else f", line {line}"
        return TextError(f"`{self.path}`{place}: {message}")

    def characters(self) -> Iterator[str]:
        """The file's characters in pieces of up to `BLOCK_BYTES`.

        Raises:
            TextError: for bytes that are no text, with line and byte offset, and for a damaged or hostile archive.
        """
        # Line ends of every system become "\n".
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(self.encoding)(), translate=True)
        offset, line = 0, 1
        for block in self._blocks():
            offset += len(block)
            try:
                piece = decoder.decode(block)
            except UnicodeDecodeError as error:
                raise self._undecodable(error, offset, line) from None
            if "\x00" in piece:
                at = line + piece[: piece.index("\x00")].count("\n")
                raise self.error(f"holds NUL characters; it is binary, or UTF-16 without its mark. {READABLE}", at)
            line += piece.count("\n")
            if piece:
                yield piece
        try:
            rest = decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise self._undecodable(error, offset, line) from None
        if rest:
            yield rest

    def _undecodable(self, error: UnicodeDecodeError, end: int, line: int) -> TextError:
        """For bytes that lie in what was read last, up to the offset ``end``."""
        start = end - len(error.object)
        at = line + error.object[: error.start].count(b"\n")
        found = error.object[error.start : error.start + 1].hex()
        name = "UTF-16" if "16" in self.encoding else "UTF-8"
        where = " of what it unpacks to" if self.compression else ""
        return self.error(
            f"byte 0x{found} at offset {start + error.start}{where} is no {name}. Save the file as UTF-8, for "
            f"instance by `iconv -f latin1 -t utf-8`, if that is what it is in.", at,
        )  # fmt: skip

    def _blocks(self) -> Iterator[bytes]:
        stored, unpacked = max(self.path.stat().st_size, 1), 0
        with _opened(self.path, self.compression) as source:
            while True:
                try:
                    block = source.read(BLOCK_BYTES)
                except (OSError, EOFError, zlib.error) as error:
                    raise self.error(f"is damaged or cut short: {self.compression} says `{error}`.") from None
                if not block:
                    return
                unpacked += len(block)
                if self.compression and unpacked > max(UNSUSPECTED_BYTES, MOST_EXPANSION * stored):
                    raise self.error(
                        f"unpacks to more than {MOST_EXPANSION} times its {stored} bytes, which no text does. Unpack "
                        f"it yourself if you trust it."
                    )
                yield block


def identify(path: Path) -> TextFile:
    """Tell what a file is, from its first `BLOCK_BYTES`.

    Raises:
        TextError: for a folder, a pipe, a missing or empty file, and for what is known to be no text.
    """
    _check_regular(path)
    with path.open("rb") as file:
        head = file.read(BLOCK_BYTES)
    compression = next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)
    if compression is not None:
        head = next(TextFile(path, TEXT, compression)._blocks(), b"")
    file_ = TextFile(path, TEXT, compression)
    if not head:
        raise file_.error("is empty.")
    if head.startswith(PARQUET_MAGIC):
        if compression is not None:
            raise file_.error(f"is Parquet inside {compression}. Unpack it; Parquet is compressed inside.")
        return TextFile(path, PARQUET)
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")
    if encoding == "utf-32":
        raise file_.error(f"is UTF-32. Save it as UTF-8. {READABLE}")
    if encoding == "utf-8":
        refused = next((name for magic, name in REFUSED.items() if head.startswith(magic)), None)
        if refused is not None:
            raise file_.error(f"is {refused}. {READABLE}")
    first = next(TextFile(path, TEXT, compression, encoding).characters(), "")
    return TextFile(path, _kind(TextFile(path, TEXT, compression, encoding), first), compression, encoding)


def promises_rows(path: Path) -> str:
    """The suffix of a name that promises rows, in lower case, also before `.gz` or `.zst`; empty where none does."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in ROW_SUFFIXES else ""


def _check_regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise TextError(f"there is no file `{path}`. {READABLE}") from None
    except OSError as error:
        raise TextError(f"`{path}` cannot be read: {error.strerror}.") from None
    if stat.S_ISDIR(mode):
        raise TextError(f"`{path}` is a folder. {READABLE}")
    if not stat.S_ISREG(mode):
        raise TextError(f"`{path}` is a pipe or a device, which cannot be read twice. Write it to a file first.")


def _kind(file: TextFile, head: str) -> str:
    """What decoded text is: rows where it begins like JSON or its name says so."""
    suffix = promises_rows(file.path)
    if suffix == ".parquet":
        raise file.error(f"is no Parquet file: it does not begin with `{PARQUET_MAGIC.decode()}`.")
    start = head.lstrip()
    if suffix in (".csv", ".tsv"):
        return CSV if suffix == ".csv" else TSV
    is_json = suffix in JSON_SUFFIXES
    # Prose may begin with a bracket, as in "[Verse 1]"; what follows tells.
    if start.startswith("[") and (is_json or re.match(r'\[\s*[\[{"]', start)):
        return ARRAY
    if is_json or re.match(r'\{\s*["}]', start):
        return VALUES if _goes_on(start) else LINES
    return TEXT


def _goes_on(start: str) -> bool:
    """Whether a JSON value goes on after its first line, which then ends between two of its parts."""
    line, _, rest = start.partition("\n")
    line, rest = line.rstrip(), rest.lstrip()
    return bool(rest) and (line.endswith(("{", "[")) or (line.endswith((",", ":")) and not rest.startswith("{")))


def _opened(path: Path, compression: str | None) -> IO[bytes] | Any:
    if compression == GZIP:
        return gzip.open(path, "rb")
    if compression == ZSTANDARD:
        import pyarrow

        return pyarrow.input_stream(str(path), compression=ZSTANDARD)
    return path.open("rb")
