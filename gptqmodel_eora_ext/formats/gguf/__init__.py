"""GGUF, the file format of llama.cpp: reading its header and tensors, and writing adapters and importance matrices.

A file is a header (magic, version, counts), metadata (key, type, value), a table of tensors (name, dimensions, type,
offset), padding, and the tensors' bytes. All numbers are little-endian. Dimensions stand with the fastest one first, so
a weight that torch calls out × in is written as (in, out). Rows of a quantised tensor are cut into blocks of 32 to 256
weights, each with its scales.

The package `gguf` (llama.cpp's own, on PyPI) knows the types and names of tensors. It is an extra, and is imported
where it is needed.
"""

from __future__ import annotations

from types import ModuleType

EXTRA = "pip install 'gptqmodel-eora-ext[gguf]'"


# Q2_0, which gguf 0.19 does not know: its number, weights in a block, and bytes of one. `blocks` draws it.
Q2_0, Q2_0_NUMBER, Q2_0_BLOCK, Q2_0_BYTES = "Q2_0", 42, 64, 18


class GGUFError(ValueError):
    """A GGUF file is broken, or not of the kind that is expected."""


def gguf_package() -> ModuleType:
    """Return llama.cpp's package `gguf`.

    Raises:
        ValueError: naming the extra, where it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError(f"EoRA: GGUF files need the package `gguf`: {EXTRA}.") from None
    module: ModuleType = gguf
    return module
