"""Adapters over checkpoints that other tools made, served by vLLM's own methods for their formats and its LoRA path."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vllm_reference import losses
from benchmarks.vllm_tools import Server
from tests.hosts.foreign_models import FORMATS, computed_apart
from tests.hosts.test_foreign import RANK, Batches, make
from tests.vllm.test_serving import LINEARS

pytestmark = pytest.mark.vllm

# Of `FORMATS`, those that vLLM's CPU build has a kernel and LoRAs for on any processor (docs/foreign.md tells of the
# others), and how far apart both sides may be, of how far the checkpoint is without its adapter: both compute in
# bfloat16, in other orders, and FP8_DYNAMIC rounds inputs on one side alone, by nearly as much as the adapter mends.
# compressed-tensors has to be installed, as `make test-formats` does.
SERVED = {"2:4, plain": 0.3, "compressed-tensors W4A16": 0.3, "compressed-tensors FP8_DYNAMIC": 0.9}
LORA = {"enable_lora": True, "max_loras": 1, "max_lora_rank": RANK, "lora_target_modules": LINEARS}


def apart(served: list[list[float]], expected: list[list[float]]) -> float:
    """Root of the mean square over tokens, in nats."""
    pairs = [(one, other) for a, b in zip(served, expected, strict=True) for one, other in zip(a, b, strict=True)]
    return math.sqrt(sum((one - other) ** 2 for one, other in pairs) / len(pairs))


@pytest.mark.parametrize(("name", "tolerance"), SERVED.items())
def test_served_with_its_adapter(
    name: str, tolerance: float, server: Server, two_layers: Path, calibration: Batches, prompts: list[list[int]],
    tokenizer: Any, tmp_path: Path,
) -> None:  # fmt: skip
    form = FORMATS[name]
    if form.needs:
        pytest.importorskip(form.needs)
    checkpoint = form.make(two_layers, tmp_path / "checkpoint")
    tokenizer.save_pretrained(checkpoint)
    adapter = make(two_layers, checkpoint, calibration, tmp_path / "adapter")
    model = computed_apart(two_layers, checkpoint, adapter)
    expected = [losses(model, ids) for ids in prompts]
    options = {"dtype": "bfloat16", **LORA}
    with_adapter = server.ask(checkpoint, prompts, losses=True, loras=[str(adapter)] * len(prompts), options=options)
    without = server.ask(checkpoint, prompts, losses=True, options={"dtype": "bfloat16"})
    assert "error" not in with_adapter, with_adapter["error"]
    assert apart(with_adapter["losses"], expected) < tolerance * apart(without["losses"], expected)
