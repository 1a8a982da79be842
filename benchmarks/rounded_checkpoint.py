"""A checkpoint in GPTQ's format that takes a minute to make: weights rounded to nearest, an adapter of random factors.

Memory, time to the first token and tokens per second do not depend on the values of weights and factors, so that they
can be measured on it. What it computes is of no use.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gptqmodel_eora_ext.adapter.factors import ModuleFactors
from gptqmodel_eora_ext.adapter.save import save_adapter
from gptqmodel_eora_ext.formats.names import MODEL_CONFIG, QUANTIZE_CONFIG
from gptqmodel_eora_ext.formats.packed_weights import pack_words

LAYERS = ".layers."
ADAPTER = "eora"
# Widths of a model that takes next to nothing: two groups, and heads of a usual width.
TINY = {
    "num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 64, "layer_types": ["full_attention"], "max_window_layers": 1,
    "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def rounded_checkpoint(model: Path, folder: Path, *, bits: int, group_size: int, rank: int) -> None:
    """Write the checkpoint of a model into a new folder.

    Every matrix of the decoder layers is packed, symmetric, in groups of inputs; the rest stays as it is. In memory is
    the whole checkpoint, once.

    Args:
        model: folder of a model at full precision.
        folder: where to.
        bits: 2, 3, 4 or 8.
        group_size: inputs per scale.
        rank: of the 16-bit adapter, for every packed matrix.
    """
    folder.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix not in (".safetensors",) and not path.name.endswith(".index.json"):
            shutil.copy(path, folder / path.name)
    tensors, factors = {}, {}
    for name, tensor in _tensors(model):
        if LAYERS not in name or tensor.ndim != 2:
            tensors[name] = tensor
            continue
        module = name.removesuffix(".weight")
        packed = _packed(tensor, bits, group_size)
        tensors |= {f"{module}.{part}": one for part, one in packed.items()}
        factors[module] = _factors(tensor.shape[0], tensor.shape[1], rank)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_adapter(folder / ADAPTER, factors, base_model=str(folder), module_names=factors, details={"objective": "none"})
    config: dict[str, Any] = {
        "bits": bits, "group_size": group_size, "desc_act": False, "sym": True, "lm_head": False, "method": "gptq",
        "quant_method": "gptq", "format": "gptq", "checkpoint_format": "gptq", "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }  # fmt: skip
    whole = json.loads((folder / MODEL_CONFIG).read_text())
    (folder / MODEL_CONFIG).write_text(json.dumps({**whole, "quantization_config": config}, indent=2))
    adapter = {"name": "lora", "path": ADAPTER, "rank": rank}
    (folder / QUANTIZE_CONFIG).write_text(json.dumps({**config, "adapter": adapter}, indent=2))


def tiny_model(model: Path, folder: Path) -> None:
    """Write a model of the same architecture, with the same tokenizer, that takes next to nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(model)
    known = config.to_dict()
    for name, value in TINY.items():
        if name in known:
            setattr(config, name, value)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def _tensors(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                yield name, handle.get_tensor(name)


def _packed(weight: torch.Tensor, bits: int, group_size: int) -> dict[str, torch.Tensor]:
    """The four tensors of a weight, out × in; zeros as version 1 stores them, less one."""
    out_features, in_features = weight.shape
    groups = -(-in_features // group_size)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * group_size - in_features))
    zero = 1 << (bits - 1)
    scales = (padded.view(out_features, groups, group_size).abs().amax(2) / zero).clamp_min(1e-6).to(torch.float16)
    steps = padded / scales.float().repeat_interleave(group_size, dim=1)
    codes = (steps.round() + zero).clamp(0, 2 * zero - 1)[:, :in_features].to(torch.int32)
    zeros = torch.full((groups, out_features), zero - 1)
    return {
        "qweight": pack_words(codes.T, bits).contiguous(),
        "qzeros": pack_words(zeros.T, bits).T.contiguous(),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(in_features, dtype=torch.int32) // group_size,
    }


def _factors(out_features: int, in_features: int, rank: int) -> ModuleFactors:
    random = torch.Generator().manual_seed(0)
    lora_A = torch.randn(rank, in_features, generator=random) * in_features**-0.5
    lora_B = torch.randn(out_features, rank, generator=random) * 1e-2
    return ModuleFactors(lora_A.half(), lora_B.half(), requested_rank=rank, tokens=0, signal=0.0, error_before=0.0,
                         error_after=0.0)  # fmt: skip
