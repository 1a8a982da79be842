"""A safetensors file that is written through memory: what is too much to hold, the system may keep on disk."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..system.files import require_space

# safetensors' names of the dtypes.
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def mapped_tensors(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, torch.Tensor]:
    """Make a safetensors file of zeros, and give its tensors mapped into memory: writing to them writes the file.

    Raises:
        OSError: when there is too little space.
    """
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    # Filled up with spaces, so that the data begins at a multiple of 8.
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    require_space(path, begin + end)
    with path.open("w+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(begin + end)
        memory = torch.frombuffer(mmap.mmap(file.fileno(), begin + end), dtype=torch.uint8)
    found = {}
    for name, (dtype, shape) in tensors.items():
        first, last = header[name]["data_offsets"]
        found[name] = memory[begin + first : begin + last].view(dtype).view(shape)
    return found
