"""Loss on windows, and sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gptqmodel_eora_ext.evaluate.perplexity import text_loss
from gptqmodel_eora_ext.evaluate.size import readable, weight_bytes


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config)


def test_equals_the_models_own_loss(model: LlamaForCausalLM) -> None:
    ids = torch.randint(50, (7 * 9 + 3,))
    own = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids[: 7 * 9].view(7, 9)]
    seen: list[tuple[int, int]] = []
    loss = text_loss(model, ids, window=9, progress=lambda done, total: seen.append((done, total)))
    assert loss.nats == pytest.approx(sum(own) / 7, rel=1e-5)
    assert (loss.windows, loss.tokens) == (7, 56)
    assert seen == [(4, 7), (7, 7)]
    assert text_loss(model, ids, window=9, max_windows=2).nats == pytest.approx(sum(own[:2]) / 2, rel=1e-5)


def test_text_shorter_than_a_window(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="The text has 5 tokens; one window of 9"):
        text_loss(model, torch.zeros(5, dtype=torch.long), window=9)


def test_sizes(tmp_path: Path) -> None:
    (tmp_path / "eora").mkdir()
    (tmp_path / "model.safetensors").write_bytes(bytes(1500))
    (tmp_path / "eora" / "adapter_model.safetensors").write_bytes(bytes(500))
    assert weight_bytes(tmp_path) == 1500
    assert [readable(count) for count in (12, 1500, 2_500_000, 3_210_000_000)] == [
        "12 B",
        "1.5 kB",
        "2.5 MB",
        "3.21 GB",
    ]
