"""Writing a GGUF file by llama.cpp's package, in one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...system.files import replaced_file
from . import gguf_package


@contextmanager
def written(path: Path, architecture: str) -> Iterator[Any]:
    """Yield a `gguf.GGUFWriter`; what it is given is in the file once the block ends, and until then an older file is.

    Args:
        path: the file.
        architecture: `general.architecture`.

    Raises:
        ValueError: when the package `gguf` is missing.
        OSError: when the file cannot be written.
    """
    with replaced_file(path) as fresh:
        writer = gguf_package().GGUFWriter(fresh, architecture)
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
