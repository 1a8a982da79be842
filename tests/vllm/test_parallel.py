"""Tensor parallelism: two processes, each with its share of codes, scales, `g_idx`, A and B."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.vllm_reference import dense_model
from benchmarks.vllm_tools import MISSING, Server, is_installed
from tests.vllm.conftest import Checkpoints
from tests.vllm.test_serving import TOKENS, check

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def two_processes() -> Iterator[Server]:
    if not is_installed():
        pytest.skip(MISSING)
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two processors")
    with Server(environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}) as running:
        yield running


@pytest.fixture(scope="module")
def even_heads(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, calibration: Any) -> Checkpoints:
    """Checkpoints of a random model with biases and a head of its own; SmolLM2 has 9 heads, which do not halve."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.08,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3)
    base: Path = tmp_path_factory.mktemp("even-heads")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    return Checkpoints(base, tmp_path_factory.mktemp("checkpoints"), calibration)


@pytest.mark.parametrize(
    ("name", "adapter", "config"),
    (
        (
            "desc_act",
            {"rank": 24, "factor_bits": 4},
            {"bits": 3, "group_size": 64, "sym": False, "desc_act": True, "act_group_aware": False},
        ),
        ("head", {"rank": 16}, {"bits": 4, "group_size": 64, "lm_head": True}),
    ),
)
def test_two_processes(
    name: str,
    adapter: dict[str, Any],
    config: dict[str, Any],
    two_processes: Server,
    even_heads: Checkpoints,
    prompts: list[list[int]],
) -> None:
    folder = even_heads(name, adapter, **config)
    answer = two_processes.ask(folder, prompts, losses=True, tokens=TOKENS, options={"tensor_parallel_size": 2})
    check(answer, prompts, [dense_model(folder, "own")] * len(prompts))
