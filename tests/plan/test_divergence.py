"""Measured divergences against the definition."""

from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.plan.divergence import Divergence

from .helpers import VOCABULARY, tiny_model

TOKENS = 12


@pytest.fixture
def model() -> Any:
    return tiny_model()


def batches() -> list[dict[str, Any]]:
    """One of two windows, the second padded; one window without a mask."""
    ids = torch.arange(3 * TOKENS).view(3, TOKENS) % VOCABULARY
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, TOKENS // 2 :] = 0
    return [{"input_ids": ids[:2], "attention_mask": mask}, {"input_ids": ids[2]}]


@torch.no_grad()
def log_probabilities(model: Any) -> torch.Tensor:
    first, second = batches()
    padded = model(**first).logits
    rows = [padded[0], padded[1, : TOKENS // 2], model(input_ids=second["input_ids"][None]).logits[0]]
    return torch.cat(rows).log_softmax(-1)


def test_divergence_is_by_its_definition_and_weights_come_back(model: Any) -> None:
    linears = {name: one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    divergence = Divergence(model, linears, batches())
    before = log_probabilities(model)
    originals = {name: linears[name].weight.data.clone() for name in linears if name.endswith("up_proj")}
    replaced = {name: weight.round(decimals=1) for name, weight in originals.items()}
    found = divergence(replaced)
    assert all(torch.equal(linears[name].weight, weight) for name, weight in originals.items())
    for name, weight in replaced.items():
        linears[name].weight.data = weight
    after = log_probabilities(model)
    assert found == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-4)
    assert found > 0
    assert divergence({}) > 0.5 * found  # the reference is of the model that it was made with


def test_weights_come_back_after_an_error(model: Any) -> None:
    linears = {"lm_head": model.lm_head}
    divergence = Divergence(model, linears, batches())
    original = model.lm_head.weight.data.clone()
    with pytest.raises(RuntimeError):
        divergence({"lm_head": torch.zeros(3, 3)})
    assert torch.equal(model.lm_head.weight, original)
