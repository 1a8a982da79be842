"""Which kernel each module of a checkpoint would be multiplied by, read from its files without loading it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..adapter.errors import AdapterError
from ..adapter.summary import AdapterSummary
from ..formats.names import QUANTIZE_CONFIG
from ..formats.packed_weights import WORD_BITS
from ..kernels.dispatch import TORCH, TRITON, Choice, choose, switched_off

# Rows of x in generation at batch 1, and in a prompt.
ONE_ROW, MANY_ROWS = 1, 512
FORMATS = ("gptq", "gptq_v2")
# Bits that GPTQModel has fused kernels for on CUDA, which its automatic order puts before ours.
HOST_FIRST_BITS = (4, 8)


@dataclass(frozen=True)
class ModuleKernels:
    """A quantised module's shape and its kernels.

    Attributes:
        module: its name.
        out_features: outputs.
        in_features: inputs.
        bits: of a code.
        group_size: inputs per scale.
        rank: of its adapter; 0 for none.
        one_row: kernel for one row.
        many_rows: kernel for `MANY_ROWS`.
        reason: why not a faster one; empty for the fastest.
    """

    module: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    rank: int
    one_row: str
    many_rows: str
    reason: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def kernel_report(checkpoint: Path, summary: AdapterSummary) -> list[ModuleKernels]:
    """The kernels on this machine's device, for the dtype that the checkpoint's config names.

    Raises:
        AdapterError: when ``checkpoint`` is no checkpoint.
    """
    settings = checkpoint / QUANTIZE_CONFIG
    if not settings.is_file():
        raise AdapterError(
            f"`{checkpoint}` has no {QUANTIZE_CONFIG}; --kernels needs a checkpoint, not an adapter alone."
        )
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float16"))
    quantized = json.loads(settings.read_text(encoding="utf-8"))
    form = str(quantized.get("format") or quantized.get("checkpoint_format") or FORMATS[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = _shapes(checkpoint)
    rows = []
    for name in sorted(key.removesuffix(".qweight") for key in shapes if key.endswith(".qweight")):
        words, out_features = shapes[f"{name}.qweight"]
        groups = shapes[f"{name}.scales"][0]
        in_features = shapes[f"{name}.g_idx"][0] if f"{name}.g_idx" in shapes else 0
        bits = round(words * WORD_BITS / in_features) if in_features else 0
        if form in FORMATS and in_features:
            one, many = (choose(device, dtype, bits, count, switched_off()) for count in (ONE_ROW, MANY_ROWS))
        else:
            one = many = Choice(TORCH, reason=f"the kernels read the formats {' and '.join(FORMATS)}, not {form}")
        reason = one.reason or many.reason
        if one.path == TRITON and bits in HOST_FIRST_BITS:
            reason = f"Marlin, Machete, Swordfish or ExLlamaV2 come first where they take {bits} bits of this shape"
        rows.append(
            ModuleKernels(
                module=name,
                out_features=out_features,
                in_features=in_features,
                bits=bits,
                group_size=-(-in_features // groups),
                rank=summary.ranks.get(name, 0),
                one_row=str(one),
                many_rows=str(many),
                reason=reason,
            )
        )
    return rows


def _shapes(checkpoint: Path) -> dict[str, list[int]]:
    shapes = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118, the handle is no mapping
                shapes[key] = handle.get_slice(key).get_shape()
    return shapes
