"""SmolLM2 in 768 channels in place of 576, computing the same: GGUF's types of 256 weights a block need such a width.

A quantised row of 576 weights has no place in blocks of 256, so that llama-quantize falls back to other types for it.
What is added is zeros: channels of the residual stream, heads (9 and 3 become 12 and 4), rows and columns. RMSNorm
divides by the root of the mean over channels, of which there are 4/3 as many now, so its weights are scaled by √(3/4)
and its ε by 3/4.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

WIDTH = 768


def pad(source: Path, folder: Path, width: int = WIDTH) -> None:
    """Write a padded copy of a Llama model, in float32.

    Args:
        source: folder of a model whose heads are as wide as its channels together.
        folder: to write.
        width: channels of the copy, a multiple of its heads' width.
    """
    plain: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = plain.config
    ratio = width / config.hidden_size
    heads = config.num_attention_heads, config.num_key_value_heads
    config.num_attention_heads, config.num_key_value_heads = (round(count * ratio) for count in heads)
    if config.num_attention_heads * config.head_dim != width:
        raise ValueError(f"{width} channels are no whole number of heads of {config.head_dim}.")
    # A larger number of queries to a key would mix real heads with heads of zeros.
    assert heads[0] * config.num_key_value_heads == heads[1] * config.num_attention_heads
    norm_scale = math.sqrt(config.hidden_size / width)
    config.rms_norm_eps *= config.hidden_size / width
    config.hidden_size = width
    padded = LlamaForCausalLM(config).to(torch.float32)
    sources = plain.state_dict()
    with torch.no_grad():
        for name, target in padded.state_dict().items():
            values = sources[name] * (norm_scale if "norm" in name else 1)
            target.zero_()
            target[tuple(slice(0, size) for size in values.shape)] = values
    padded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
