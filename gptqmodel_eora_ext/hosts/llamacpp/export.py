"""`eora export CHECKPOINT --gguf`: GPTQ checkpoints and PEFT adapters as GGUF files, the weights staying what they are.

The model's own GGUF file in 16 bits gives everything but the quantised weights: metadata, vocabulary, norms,
embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ...adapter.folder import AdapterFolder
from ...adapter.summary import find_adapter
from ...formats.gguf import Q2_0
from ...formats.gguf.blocks import WEIGHT_TYPES, weight_blocks
from ...formats.gguf.lora import LoraPair, write_lora
from ...formats.gguf.model import GGUFModel, bits_per_weight
from ...formats.gguf.rewrite import Replacement, rewrite
from ...formats.gptq_checkpoint import FORMATS, checkpoint_format, packed_weights
from ...formats.names import ADAPTER_CONFIG, QUANTIZE_CONFIG
from ...formats.packed_weights import PackedWeight
from ...formats.sizes import ModuleShape
from ...kernels.reference import dequantize
from ..jobs import Exported, ExportJob
from .generate import DEFAULT_SUFFIX
from .weights import GGUFWeights, Placed

# A module may differ by this share of its weights' norm at most: rounding scales of bfloat16 or float32 to float16
# makes 2⁻¹² to 2⁻¹¹ of it. More would be another model than the one that was measured.
LARGEST_DIFFERENCE = 2**-10
# llama.cpp's numbers for a file that is mostly of a type.
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, Q2_0: 41}
WEIGHT = ".weight"


def export(job: ExportJob) -> Exported:
    """Write a checkpoint and the adapter that it names, or an adapter alone.

    One module's weights are in memory at a time. Factors are stored in F16, at any rank.

    Raises:
        ValueError: for a checkpoint in another format than GPTQ's, a module that no type of ggml holds, a file of
            another model, or an adapter without the base to compare with.
        AdapterError: for a broken adapter.
    """
    like = GGUFModel(job.like)
    if (job.source / ADAPTER_CONFIG).is_file():
        return _export_adapter(job, like)
    return _export_checkpoint(job, like)


def _export_adapter(job: ExportJob, like: GGUFModel) -> Exported:
    if job.base is None:
        raise ValueError(
            f"EoRA: `{job.source}` is an adapter, which does not tell the order of rows in `{job.like}`. Name the "
            f"folder of the model that this file holds, in full precision, by --base."
        )
    folder = AdapterFolder.open(job.source)
    with ExitStack() as stack:
        read = _reader(job.base, stack)
        shapes = [ModuleShape(name, *read(name).shape) for name in folder.keys]
        placed = GGUFWeights(like, str(job.base)).locate(shapes, read)
    _write_adapter(job, folder, like, placed, job.output)
    return Exported(None, job.output, {}, len(placed))


def _export_checkpoint(job: ExportJob, like: GGUFModel) -> Exported:
    if like.header.path != job.like or len({info.path for info in like.tensors.values()}) > 1:
        raise ValueError(f"EoRA: `{job.like}` is split; join it by `llama-gguf-split --merge` first.")
    zero_minus_one = _checked_format(job.source)
    found = find_adapter(job.source, required=False)
    with ExitStack() as stack:
        packed = packed_weights(job.source, stack, zero_minus_one)
        if not packed:
            raise ValueError(f"EoRA: `{job.source}` holds no packed weight. Is it a quantised checkpoint?")
        unfit, shapes = _looked_through(packed, job)
        if unfit:
            raise ValueError(
                f"EoRA: {len(unfit)} of {len(packed)} modules of `{job.source}` have no exact type in GGUF. {unfit[0]}"
            )
        read = _dequantized(packed)
        placed = GGUFWeights(like, str(job.source)).locate(shapes, read)
        types = {name: WEIGHT_TYPES[packed[name]().bits][0] for name in placed}
        inexact = {name: gap for name in placed if (gap := _difference(packed[name]()))}
        worst = max(inexact, key=lambda name: inexact[name], default=None)
        if worst is not None and inexact[worst] > LARGEST_DIFFERENCE:
            raise ValueError(
                f"EoRA: {worst} would differ from the checkpoint by {inexact[worst]:.2%}, at most "
                f"{LARGEST_DIFFERENCE:.2%} is allowed: its scales do not fit float16."
            )
        replaced = {
            one.place.tensor: Replacement(
                types[name],
                round(one.shape.weights * bits_per_weight(types[name]) / 8),
                partial(_blocks, packed[name], one),
            )
            for name, one in placed.items()
        }
        most = max(set(types.values()), key=list(types.values()).count)
        rewrite(like.header, job.output, replaced, FILE_TYPES[most])
    adapter = None
    if found is not None:
        adapter = job.output.with_name(job.output.stem + DEFAULT_SUFFIX)
        _write_adapter(job, AdapterFolder.open(found), like, placed, adapter)
    return Exported(job.output, adapter, inexact, len(placed))


def _checked_format(folder: Path) -> bool:
    """Whether a checkpoint stores zero points less one.

    Raises:
        ValueError: for a folder that is no checkpoint in GPTQ's format.
    """
    named = checkpoint_format(folder)
    if named not in FORMATS:
        raise ValueError(
            f"EoRA: `{folder}` is in the format {named!r}, expected GPTQ's ({' or '.join(FORMATS)}, by "
            f"{QUANTIZE_CONFIG}). For other checkpoints quantise the model's GGUF file by llama-quantize and make an "
            f"adapter for that: `eora generate`."
        )
    return FORMATS[named]


def _looked_through(
    packed: Mapping[str, Callable[[], PackedWeight]], job: ExportJob
) -> tuple[list[str], list[ModuleShape]]:
    """Why modules fit no type, and the shapes of all; nothing is written before."""
    unfit: list[str] = []
    shapes: list[ModuleShape] = []
    for done, (name, read) in enumerate(sorted(packed.items())):
        if job.report is not None:
            job.report(done, len(packed))
        weight = read()
        shapes.append(ModuleShape(name, weight.out_features, weight.in_features))
        try:
            weight_blocks(weight)
        except ValueError as error:
            unfit.append(str(error))
    if job.report is not None:
        job.report(len(packed), len(packed))
    return unfit, shapes


def _dequantized(packed: Mapping[str, Callable[[], PackedWeight]]) -> Callable[[str], torch.Tensor]:
    return lambda name: dequantize(packed[name]())


def _difference(weight: PackedWeight) -> float:
    """‖Ŵ in blocks − Ŵ‖ / ‖Ŵ‖; 0 where scales are float16 values."""
    scales = weight.scales.to(torch.float32)
    gap = scales.to(torch.float16).to(torch.float32) - scales
    if not bool(gap.any()):
        return 0.0
    group = weight.group_of_input()
    steps = (weight.codes() - weight.zeros()[group]).to(torch.float32)
    whole = float((scales[group] * steps).norm())
    return float((gap[group] * steps).norm()) / whole if whole > 0 else 0.0


def _blocks(read: Callable[[], PackedWeight], one: Placed) -> np.ndarray:
    _, blocks = weight_blocks(read())
    return blocks if one.order is None else blocks[one.order.numpy()]


def _reader(folder: Path, stack: ExitStack) -> Callable[[str], torch.Tensor]:
    """What reads weights of a full-precision folder by the module's name."""
    files: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        handle = stack.enter_context(safe_open(path, framework="pt"))
        files |= {key: handle for key in handle.keys()}  # noqa: SIM118, C420

    def read(name: str) -> torch.Tensor:
        if f"{name}{WEIGHT}" not in files:
            raise ValueError(f"EoRA: `{folder}` holds no weight of {name}. Name the adapter's full-precision model.")
        weight: torch.Tensor = files[f"{name}{WEIGHT}"].get_tensor(f"{name}{WEIGHT}")
        return weight.to(torch.float32)

    return read


def _write_adapter(
    job: ExportJob, folder: AdapterFolder, like: GGUFModel, placed: Mapping[str, Placed], output: Path
) -> None:
    names = folder.match(list(placed))
    module_of = {theirs: ours for ours, theirs in names.items()}
    pairs = {}
    for name, factors in folder.factors(list(module_of)):
        one = placed[module_of[name]]
        if bool(factors.lora_B.any()):
            pairs[one.place.tensor] = LoraPair(factors.lora_A, one.in_file_order(factors.lora_B))
    write_lora(
        output, like.architecture, pairs, name=f"adapter of {job.source.name}", details=dict(folder.details or {})
    )
