"""What tests of sensitivities and of kinds share."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 48


def tiny_model() -> Any:
    """Two layers of random weights, large enough that outputs are not all alike."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
