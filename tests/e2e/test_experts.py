"""Ranks under a budget for mixtures of experts, in GPTQModel's loop."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel import GPTQModel, QuantizeConfig

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.hosts.gptqmodel.modules import layered, module_shapes
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.plan.survey import first_tokens
from gptqmodel_eora_ext.plan.sweep import Question, Rounding, sweep
from gptqmodel_eora_ext.solve import Grid

from .helpers import Batches, load, quantize

pytestmark = pytest.mark.e2e

EXPERTS, ROUTED = 4, 2
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": ROUTED, "initializer_range": 0.2,
}  # fmt: skip


MODELS: dict[str, dict[str, Any]] = {
    "Qwen3MoeConfig": {"moe_intermediate_size": 64, "num_experts": EXPERTS, "head_dim": 32},
    "MixtralConfig": {"num_local_experts": EXPERTS},
}
# In a process of its own: where GPTQModel is imported, transformers saves experts in another layout than hubs hold.
SAVING = """
import json, sys, torch, transformers
name, sizes, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
config = getattr(transformers, name)(**sizes)
transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
"""


@pytest.fixture(scope="module", params=MODELS)
def experts(request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model whose experts lie in one tensor in transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    sizes = json.dumps({**SIZES, **MODELS[request.param], "vocab_size": len(tokenizer)})
    subprocess.run([sys.executable, "-c", SAVING, request.param, sizes, str(folder)], check=True)
    tokenizer.save_pretrained(folder)
    return folder


def test_experts_count_by_the_tokens_that_reach_them(experts: Path, calibration: Batches) -> None:
    with quiet():
        host = GPTQModel.load(str(experts), QuantizeConfig(bits=2, group_size=32))
    shapes = module_shapes(host)
    names = [shape.name for shape in shapes]
    assert len([name for name in names if ".experts." in name]) == 2 * 3 * EXPERTS
    # Half of every weight is lost: an eighth of a nat by relative errors, times the share of tokens.
    question = Question(lambda name: Rounding((2,), Grid(32)), lambda name, bits: 8, lambda name, weight: weight * 0.5)
    batches = first_tokens([{"input_ids": one["input_ids"]} for one in calibration], 512)
    found = sweep(layered(host, shapes), names, batches, None, question)
    for layer in range(2):
        ups = [name for name in names if f"layers.{layer}.mlp.experts" in name and name.endswith("up_proj")]
        assert sum(found.reached[name] for name in ups) == ROUTED * found.tokens
    for name in names:
        share = found.reached[name] / found.tokens
        assert (share < 1) == (".experts." in name)
        assert found.forecasts[name][2].total == pytest.approx(0.125 * share, rel=2e-3)


def test_ranks_under_a_budget(
    experts: Path, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.WARNING)
    adapter = EoRA(budget="1bpw", factor_bits=4)
    made = quantize(experts, tmp_path / "model", QuantizeConfig(bits=2, group_size=32), calibration, adapter=adapter)
    report = made.host._eora_run.allocation.report()
    assert 0.7 * report["budget"] < report["spent"] <= report["budget"]
    assert any(".experts." in name and factors.rank for name, factors in made.factors.items())
    ids = torch.tensor([calibration[0]["input_ids"][:16]])
    with torch.inference_mode():
        assert torch.isfinite(load(tmp_path / "model")(ids).logits).all()
