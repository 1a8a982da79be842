"""GGUF files of small models, written by gguf-py as llama.cpp's converter lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

# llama.cpp's names of what stands in a layer, by Hugging Face's.
LINEARS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
# Architectures whose converter interleaves the two halves of each head of q and k.
INTERLEAVED = {"llama"}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter writes them for Llama."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def architecture(config: Any) -> str:
    """llama.cpp's name of a Hugging Face model type."""
    return {"qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)


def in_file_order(name: str, weight: torch.Tensor, config: Any) -> np.ndarray:
    """A module's rows (out × …) as they lie in the file."""
    values = weight.detach().float().numpy()
    if architecture(config) not in INTERLEAVED or not name.endswith((".q_proj", ".k_proj")):
        return values
    return interleaved(values, config.num_attention_heads if name.endswith(".q_proj") else config.num_key_value_heads)


def tensor_of(module: str) -> str:
    """Name of a module's weight in the file."""
    layer, kind = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{LINEARS[kind]}.weight"


def experts(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of all experts of a layer, experts × out × in each.

    GPTQModel, once it has opened such a model, has transformers make a module of each expert in this process.
    """
    if isinstance(module, torch.nn.ModuleList):
        parts = ("gate", "up", "down")
        return {part: torch.stack([getattr(one, f"{part}_proj").weight for one in module]) for part in parts}
    gate, up = module.gate_up_proj.chunk(2, dim=1)  # type: ignore[operator, union-attr]
    return {"gate": gate, "up": up, "down": module.down_proj}  # type: ignore[dict-item]


def write_model(
    model: Any, path: Path, kind: str = "Q4_0", *, skipped: str = "", metadata: dict[str, int] | None = None
) -> Path:
    """Write the linear layers of a model into a GGUF file.

    Args:
        model: a causal language model of Hugging Face, its experts in one tensor.
        path: the file.
        kind: ggml's type of the weights.
        skipped: ends of names of modules that stay in float16.
        metadata: more whole numbers.
    """
    config = model.config
    arch = architecture(config)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(1)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    # Long enough that no reader may keep it.
    writer.add_array("tokenizer.ggml.tokens", [f"token {index}" for index in range(5000)])
    for key, value in (metadata or {}).items():
        writer.add_uint16(key, value)

    def add(name: str, values: np.ndarray, quantized: bool) -> None:
        number = gguf.GGMLQuantizationType[kind if quantized else "F16"]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), number), raw_dtype=number)

    for name, module in model.named_modules():
        if not name.startswith("model.layers."):
            continue
        if isinstance(module, torch.nn.Linear) and name.split(".", 3)[3] in LINEARS:
            plain = bool(skipped) and name.endswith(skipped)
            add(tensor_of(name), in_file_order(name, module.weight, config), not plain)
        elif name.endswith(".experts"):
            layer = name.split(".")[2]
            for part, weight in experts(module).items():
                add(f"blk.{layer}.ffn_{part}_exps.weight", weight.detach().float().numpy(), True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
