"""The linear layers that AutoRound quantises, as it has resolved its scheme and its `layer_config`."""

from __future__ import annotations

from typing import Any

import torch
from auto_round.utils import check_to_quantized, get_block_names

from ...adapter.layers import is_linear


def quantized_linears(orchestrator: Any) -> dict[str, Any]:
    """Full name → linear layer with its `bits`, `group_size` and `sym`, of all that AutoRound quantises in its blocks.

    Args:
        orchestrator: AutoRound's object for a run whose scheme is resolved.
    """
    model = orchestrator.model_context.model
    groups = orchestrator.quant_block_list or get_block_names(model)
    blocks = tuple(f"{name}." for group in groups for name in group)
    return {name: one for name, one in model.named_modules() if name.startswith(blocks) and is_quantized(one)}


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether this is a linear layer that AutoRound quantises."""
    return is_linear(module) and bool(check_to_quantized(module))
