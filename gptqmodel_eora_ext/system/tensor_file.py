"""Tensors written to a safetensors file: the same bytes each time, one tensor's copy in memory, the system's errors.

The library's writer holds a copy of all tensors in memory, puts metadata of several keys in any order, and tells a full
disk as an error of its own kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .spill import bytes_of

# The names that safetensors gives to dtypes.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
# The header is padded to a multiple of this, so that tensors begin where their widest values may lie.
ALIGNMENT = 8


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file and bring it to the disk: length of the header (8 bytes, little endian), header (JSON), tensors.

    Args:
        path: the file.
        tensors: name → tensor, of any device, in one of `DTYPES`.
        metadata: strings, in the order in which they are written.

    Raises:
        OSError: when the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # The widest first, so that each begins at a multiple of its width.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    begin = 0
    for name in order:
        one = tensors[name]
        end = begin + one.nbytes
        header[name] = {"dtype": DTYPES[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end]}
        begin = end
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(told).to_bytes(8, "little"))
        stream.write(told)
        for name in order:
            if tensors[name].numel():
                stream.write(bytes_of(tensors[name].detach().to("cpu").contiguous()))
        stream.flush()
        os.fsync(stream.fileno())
