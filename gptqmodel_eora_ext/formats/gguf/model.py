"""A model in GGUF: one file or the parts of a split one, its tensors dequantised a few rows at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from . import Q2_0, Q2_0_BLOCK, Q2_0_BYTES, GGUFError, gguf_package
from .blocks import read_q2_0
from .header import REMEDY, Header, TensorInfo, read_header

# So many weights are dequantised together: in numpy that takes some ten times as many bytes for a while.
WEIGHTS_AT_ONCE = 1 << 22
# Types that hold weights as they are; a tensor of these is not quantised.
FLOATING = ("F32", "F16", "BF16", "F64")
# How llama-gguf-split names parts.
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
SPLIT_COUNT, SPLIT_NUMBER = "split.count", "split.no"


class GGUFModel:
    """A model's file or files.

    Args:
        path: the file; of a split model any part, the others lying beside it.

    Attributes:
        header: of the file, or of the first part, which holds the metadata.
        tensors: name → where it lies, of all parts.

    Raises:
        GGUFError: for a file that is broken, of another kind than a model, or whose other parts are missing.
        ValueError: when the package `gguf` is missing.
        OSError: when a file cannot be opened.

    Example:
        >>> model = GGUFModel(Path("model-Q2_K.gguf"))
        >>> model.read("blk.0.attn_q.weight").shape
        torch.Size([768, 768])
    """

    def __init__(self, path: Path) -> None:
        first = read_header(path)
        headers = [first] if (first.whole(SPLIT_COUNT) or 1) < 2 else _parts(first)
        self.path = path
        self.header = headers[0]
        _check_kind(self.header)
        self.tensors: dict[str, TensorInfo] = {}
        for header in headers:
            twice = self.tensors.keys() & header.tensors.keys()
            if twice:
                raise GGUFError(f"`{header.path}` holds {min(twice)}, which another part of the model holds, too.")
            self.tensors |= header.tensors

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the kind of model (`llama`, `qwen2`)."""
        return self.header.architecture

    @property
    def layers(self) -> int:
        """Number of its layers.

        Raises:
            GGUFError: where the metadata does not tell.
        """
        key = f"{self.architecture}.block_count"
        found = self.header.whole(key)
        if found is None:
            raise GGUFError(f"`{self.path}`: {key} is missing. {REMEDY}")
        return found

    def heads(self, layer: int, *, of_keys: bool = False) -> int | None:
        """Attention heads of a layer, of queries or of keys; None where the metadata does not tell."""
        found = self.header.fields.get(f"{self.architecture}.attention.head_count")
        if of_keys:
            found = self.header.fields.get(f"{self.architecture}.attention.head_count_kv", found)
        if isinstance(found, tuple):
            found = found[layer] if layer < len(found) else None
        return found if isinstance(found, int) and found > 0 else None

    def read(self, name: str, rows: Sequence[int] | None = None, *, expert: int | None = None) -> torch.Tensor:
        """See `read_tensor`.

        Raises:
            GGUFError: for a tensor that is not there, or of a type that cannot be dequantised.
        """
        return read_tensor(self.info(name), rows, expert=expert)

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies.

        Raises:
            GGUFError: where there is none of that name.
        """
        found = self.tensors.get(name)
        if found is None:
            raise GGUFError(f"`{self.path}` holds no tensor {name}.")
        return found

    def linear(self) -> Iterator[TensorInfo]:
        """Quantised matrices in layers, in the file's order: what an adapter can be for."""
        for info in self.tensors.values():
            if info.name.startswith("blk.") and len(info.shape) in (2, 3) and info.type not in FLOATING:
                yield info


def read_tensor(info: TensorInfo, rows: Sequence[int] | None = None, *, expert: int | None = None) -> torch.Tensor:
    """Dequantise a tensor.

    Args:
        info: of a tensor of one or two dimensions, or of three where ``expert`` is given.
        rows: indices of the rows that are wanted; all by default.
        expert: which part of a tensor of experts × out × in.

    Returns:
        Its values in torch's order (out × in), float32. Beside them some 160 MB are in memory while it runs.

    Raises:
        GGUFError: for a tensor of other dimensions, or of a type that cannot be dequantised.
    """
    allowed = (1, 2) if expert is None else (3,)
    if len(info.shape) not in allowed:
        raise GGUFError(f"`{info.path}`: {info.name} has {len(info.shape)} dimensions, expected {allowed[-1]}.")
    out = info.shape[-2] if len(info.shape) > 1 else 1
    width = info.shape[-1]
    row_bytes = info.nbytes // (info.weights // width)
    start = info.offset + (expert or 0) * out * row_bytes
    data = np.memmap(info.path, dtype=np.uint8, mode="r", offset=start, shape=(out, row_bytes))
    result = torch.empty(out if rows is None else len(rows), width)
    step = max(1, WEIGHTS_AT_ONCE // width)
    for first in range(0, len(result), step):
        place = slice(first, first + step)
        result[place] = torch.from_numpy(_dequantized(info, data[place] if rows is None else data[rows[place]]))
    return result[0] if len(info.shape) == 1 else result


def _dequantized(info: TensorInfo, data: np.ndarray) -> np.ndarray:
    if info.type == Q2_0:
        return read_q2_0(data)
    gguf = gguf_package()
    try:
        values = gguf.quants.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType[info.type])
    except NotImplementedError:
        raise GGUFError(
            f"`{info.path}`: {info.name} is of type {info.type}, which the installed package `gguf` cannot dequantise. "
            f"Update `gguf`, or quantise the model to another type."
        ) from None
    # A copy: values that need no dequantising are a view of the mapped file.
    return np.array(values, dtype=np.float32)


def _check_kind(header: Header) -> None:
    """Refuse adapters, importance matrices and vision encoders, which are GGUF files, too."""
    kind = header.text("general.type") or "model"
    if kind == "model" and any(name.endswith((".lora_a", ".lora_b")) for name in header.tensors):
        kind = "adapter"
    if kind != "model":
        raise GGUFError(f"`{header.path}` is of the kind `{kind}`, expected a model. Name the quantised model's file.")


def _parts(header: Header) -> list[Header]:
    """The headers of all parts of a split model, in order."""
    count = header.whole(SPLIT_COUNT) or 1
    named = SPLIT_NAME.fullmatch(header.path.name)
    if named is None or int(named[3]) != count:
        raise GGUFError(
            f"`{header.path}` is a part of a model split into {count} files, whose names end in "
            f"`-00001-of-{count:05d}.gguf`. Give the parts those names again, or join them: "
            f"`llama-gguf-split --merge first-part.gguf whole.gguf`."
        )
    found = []
    # As many files have to be there as the name says, so that a count of millions ends at the first that is missing.
    for number in range(1, count + 1):
        part = header.path.with_name(f"{named[1]}-{number:05d}-of-{count:05d}.gguf")
        if not part.is_file():
            raise GGUFError(f"`{part}` is missing, part {number} of {count} of the model. Put it beside the others.")
        one = read_header(part)
        if one.whole(SPLIT_COUNT) != count or one.whole(SPLIT_NUMBER) != number - 1:
            raise GGUFError(
                f"`{part}` says that it is part {one.whole(SPLIT_NUMBER)} (from 0) of {one.whole(SPLIT_COUNT)}, "
                f"expected {number - 1} of {count}. {REMEDY}"
            )
        found.append(one)
    return found


def bits_per_weight(type_name: str) -> float:
    """Bits that a weight takes in a type of ggml, scales included (`Q2_K`: 2.625).

    Raises:
        GGUFError: for a type that the package `gguf` does not know.
    """
    if type_name == Q2_0:
        return 8 * Q2_0_BYTES / Q2_0_BLOCK
    gguf = gguf_package()
    try:
        block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    except KeyError:
        raise GGUFError(f"`{type_name}` is no type of ggml that the installed package `gguf` knows.") from None
    return float(8 * nbytes / block)
