"""Importance matrices in GGUF, as `llama-quantize --imatrix` takes them.

For each tensor T of the model two of float32: `T.in_sum2`, Σ x² of each input channel, and `T.counts`, the number of
tokens that were summed. Of a tensor of experts both hold a row for each expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from . import GGUFError
from .writing import written

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
KIND = "imatrix"


@dataclass(frozen=True)
class Importance:
    """What was summed of one tensor's input.

    Attributes:
        sums: Σ x², 1 × in, or experts × in.
        counts: tokens, of length 1 or experts.
    """

    sums: torch.Tensor
    counts: torch.Tensor


def write_imatrix(path: Path, tensors: Mapping[str, Importance], *, source: str, windows: int, seqlen: int) -> None:
    """Write a file in one step; an older one in its place stays whole until then.

    Args:
        path: the file.
        tensors: name of the model's tensor (`blk.0.attn_q.weight`) → what was summed.
        source: what the text is called.
        windows: of tokens that were read.
        seqlen: tokens in each.

    Raises:
        GGUFError: when nothing was summed.
    """
    if not tensors:
        raise GGUFError(f"there is nothing to write into `{path}`: no tensor's input was measured.")
    # The architecture is not part of this kind of file; gguf-py writes one that is not empty.
    with written(path, KIND) as writer:
        writer.add_type(KIND)
        writer.add_array(DATASETS, [source])
        writer.add_uint32(CHUNKS, windows)
        writer.add_uint32(CHUNK_SIZE, seqlen)
        for name, one in tensors.items():
            writer.add_tensor(f"{name}{SUMS}", one.sums.to(torch.float32).cpu().contiguous().numpy())
            writer.add_tensor(f"{name}{COUNTS}", one.counts.to(torch.float32).cpu().reshape(-1, 1).contiguous().numpy())
