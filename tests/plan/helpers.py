"""What tests of sensitivities and of sweeps share: tiny models of many architectures, in memory and in a folder."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config

from gptqmodel_eora_ext.plan.checkpoint import CheckpointWeights, skeleton
from gptqmodel_eora_ext.plan.layered import LayeredModel

VOCABULARY = 48
TOKENS = 24
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": VOCABULARY, "initializer_range": 0.3,
}  # fmt: skip
# Biases, norms of heads, masks of a sliding window in some layers with rotary embeddings of their own, and embeddings
# tied and untied.
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=6, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}  # fmt: skip


def tiny_model() -> Any:
    """Two layers of random weights, large enough that outputs are not all alike."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 2})
    return LlamaForCausalLM(config).eval()


def architecture(name: str) -> Any:
    """A tiny random model, biases included, which transformers starts at 0."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    """The linear layers inside the model's layers."""
    return {name: one for name, one in model.named_modules() if ".layers." in name and isinstance(one, torch.nn.Linear)}


def in_memory(model: Any) -> LayeredModel:
    return LayeredModel(model, None, list(linears(model)))


def in_files(model: Any, folder: Path) -> LayeredModel:
    """The same model saved, and read back layer by layer."""
    model.save_pretrained(folder)
    return LayeredModel(skeleton(folder), CheckpointWeights(folder), list(linears(model)))


def windows(count: int, seed: int = 0, tokens: int = TOKENS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (count, 1, tokens), generator=generator)
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def mixed_batches() -> list[dict[str, Any]]:
    """Windows of two lengths; of the first batch's two, one is padded."""
    first, second = windows(2, 3), windows(1, 4, TOKENS // 2)
    ids = torch.cat([one["input_ids"] for one in first])
    mask = torch.ones_like(ids)
    mask[1, TOKENS // 2 :] = 0
    return [{"input_ids": ids, "attention_mask": mask}, *second]
