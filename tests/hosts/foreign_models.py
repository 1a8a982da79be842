"""A small model compressed by other tools, as they would save it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gptqmodel_eora_ext.formats.sparsity import Pattern
from gptqmodel_eora_ext.hosts.transformers.dense import dense_weight
from gptqmodel_eora_ext.hosts.transformers.reader import LayerReader
from gptqmodel_eora_ext.solve import prune

# Divides all widths of SmolLM2.
BLOCK = 64


@dataclass(frozen=True)
class Format:
    """A form of checkpoint.

    Attributes:
        make: base and folder → the folder with the checkpoint.
        needs: the library without which it can be neither made nor loaded; none for some.
        loading: makes what `from_pretrained` is given so that PEFT can put an adapter on.
        activations: whether activations are quantised as well, so that logits differ by more than rounding from what Ŵ
            gives.
    """

    make: Callable[[Path, Path], Path]
    needs: str = ""
    loading: Callable[[], Mapping[str, Any]] = dict
    activations: bool = False


def rewrite(base: Path, folder: Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> Path:
    """Copy a model, each tensor replaced by what ``change`` makes of its name and values."""
    shutil.copytree(base, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        tensors |= change(name, tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def is_linear_weight(name: str) -> bool:
    return name.endswith("_proj.weight")


def pruned_by_others(base: Path, folder: Path) -> Path:
    """2:4 by magnitude, in a plain folder."""
    pattern = Pattern.parse("2:4")
    none = torch.empty(0)

    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        zeroed = prune(tensor, none, pattern, "magnitude").to(tensor.dtype) if is_linear_weight(name) else tensor
        return {name: zeroed}

    return rewrite(base, folder, change)


def in_blocks_of_fp8(base: Path, folder: Path) -> Path:
    """`quant_method` fp8: numbers of 8 bits with a float32 scale for each block."""

    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not is_linear_weight(name):
            return {name: tensor}
        out_features, in_features = tensor.shape
        blocks = tensor.float().view(out_features // BLOCK, BLOCK, in_features // BLOCK, BLOCK)
        scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        codes = (blocks / scales[:, None, :, None]).view(out_features, in_features).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale_inv": scales}

    rewrite(base, folder, change)
    describe(folder, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]})
    return folder


def describe(folder: Path, quantization: dict[str, Any]) -> None:
    """Say in `config.json` how the model is quantised."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))


def by_torchao(base: Path, folder: Path, config: Any) -> Path:
    from transformers import TorchAoConfig

    return _saved(base, folder, TorchAoConfig(config))


def by_bitsandbytes(base: Path, folder: Path, **settings: Any) -> Path:
    from transformers import BitsAndBytesConfig

    return _saved(base, folder, BitsAndBytesConfig(**settings))


def _saved(base: Path, folder: Path, config: Any) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def by_compressed_tensors(base: Path, folder: Path, preset: str, group_size: int | None = None) -> Path:
    """As llm-compressor saves it, scales from the largest value of each group."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if group_size is not None:
        scheme.weights = scheme.weights.model_copy(update={"group_size": group_size})
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], quantization_status="frozen")
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        arguments, weight = module.quantization_scheme.weights, module.weight.data.float()
        groups = weight.reshape(len(weight), -1, arguments.group_size or weight.shape[1])
        low, high = groups.amin(-1), groups.amax(-1)
        whole = {}
        if hasattr(module, "weight_global_scale"):
            whole["global_scale"] = generate_gparam(low.min().reshape(1), high.max().reshape(1))
            module.weight_global_scale.data.copy_(whole["global_scale"].reshape(module.weight_global_scale.shape))
        scales, _ = calculate_qparams(low, high, arguments, **whole)
        module.weight_scale.data.copy_(scales.reshape(module.weight_scale.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


def _unpacked() -> dict[str, Any]:
    from transformers import CompressedTensorsConfig

    # PEFT asks a layer for its `weight`, which packed ones do not have.
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def _torchao(name: str, **settings: Any) -> Format:
    def make(base: Path, folder: Path) -> Path:
        from torchao import quantization

        return by_torchao(base, folder, getattr(quantization, name)(**settings))

    return Format(make, "torchao")


def _bitsandbytes(**settings: Any) -> Format:
    return Format(partial(by_bitsandbytes, **settings), "bitsandbytes", activations="load_in_8bit" in settings)


def _compressed_tensors(preset: str, group_size: int | None = None, *, activations: bool = False) -> Format:
    make = partial(by_compressed_tensors, preset=preset, group_size=group_size)
    return Format(make, "compressed_tensors", _unpacked, activations)


FORMATS: dict[str, Format] = {
    "2:4, plain": Format(pruned_by_others),
    "fp8, in blocks": Format(in_blocks_of_fp8),
    "bitsandbytes nf4": _bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "bitsandbytes fp4": _bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "bitsandbytes int8": _bitsandbytes(load_in_8bit=True),
    "compressed-tensors W4A16": _compressed_tensors("W4A16", 64),
    "compressed-tensors W8A16": _compressed_tensors("W8A16", 64),
    "compressed-tensors MXFP4A16": _compressed_tensors("MXFP4A16"),
    "compressed-tensors NVFP4A16": _compressed_tensors("NVFP4A16"),
    "compressed-tensors FP8_DYNAMIC": _compressed_tensors("FP8_DYNAMIC", activations=True),
    "compressed-tensors INT8": _compressed_tensors("INT8", activations=True),
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao float8": _torchao("Float8WeightOnlyConfig"),
    "torchao int4": _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
}  # fmt: skip


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids).logits
    return found.float()


def computed_apart(base: Path, checkpoint: Path, adapter: Path) -> Any:
    """The base, bfloat16, with Ŵ in place of W and (x Aᵀ) Bᵀ added to what each module gives."""
    from transformers import AutoModelForCausalLM

    reader = LayerReader(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    factors = load_file(adapter / "adapter_model.safetensors")

    def add(lora_A: torch.Tensor, lora_B: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda module, inputs, output: (output + inputs[0].float() @ lora_A.T @ lora_B.T).to(output.dtype)

    for name, module in model.named_modules():
        key = f"base_model.model.{name}.lora_A.weight"
        if key in factors:
            module.weight.data = dense_weight(reader.module(name), name, torch.bfloat16).to(torch.bfloat16)
            module.register_forward_hook(add(factors[key].float(), factors[key.replace("_A.", "_B.")].float()))
    return model
