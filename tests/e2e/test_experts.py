"""Mixtures of experts: budgets in both loops, padding among routed tokens, and what is refused by name."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round import AutoRound
from gptqmodel import GPTQModel, QuantizeConfig
from peft.tuners.lora.layer import LoraLayer
from transformers import AutoModelForCausalLM

from gptqmodel_eora_ext import EoRA, EoRAConfig, load_peft
from gptqmodel_eora_ext.adapter.errors import AdapterError
from gptqmodel_eora_ext.adapter.folder import AdapterFolder
from gptqmodel_eora_ext.hosts.gptqmodel.modules import layered, module_shapes
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.plan.survey import first_tokens
from gptqmodel_eora_ext.plan.sweep import Question, Rounding, layer_inputs, sweep
from gptqmodel_eora_ext.solve import Grid

from .helpers import Batches, load, quantize

pytestmark = pytest.mark.e2e

EXPERTS, ROUTED = 4, 2
LENGTHS = (40, 64, 17)
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": ROUTED, "initializer_range": 0.2,
}  # fmt: skip


DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 2, "moe_intermediate_size": 64, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
    "first_k_dense_replace": 0, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "n_group": 1, "topk_group": 1,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3MoeConfig": {"moe_intermediate_size": 64, "num_experts": EXPERTS, "head_dim": 32},
    "MixtralConfig": {"num_local_experts": EXPERTS},
    "DeepseekV2Config": DEEPSEEK,
    "DeepseekV3Config": DEEPSEEK,
    "GptOssConfig": {"num_local_experts": EXPERTS, "head_dim": 32},
}
# GPTQModel quantises no expert of these.
LEFT_ALONE: dict[str, dict[str, Any]] = {
    "GraniteMoeConfig": {"num_local_experts": EXPERTS},
    "MiniMaxM2Config": {"num_local_experts": EXPERTS, "head_dim": 32},
}
# In a process of its own: where GPTQModel is imported, transformers saves experts in another layout than hubs hold.
SAVING = """
import json, sys, torch, transformers
torch.manual_seed(0)
for name, sizes in json.loads(sys.argv[1]).items():
    config = getattr(transformers, name)(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(f"{sys.argv[2]}/{name}")
"""


@pytest.fixture(scope="module")
def made(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny random models whose experts lie in one tensor in transformers, by the names of their configs."""
    folder = tmp_path_factory.mktemp("experts")
    every = MODELS | LEFT_ALONE
    sizes = {name: {**SIZES, **own, "vocab_size": len(tokenizer)} for name, own in every.items()}
    subprocess.run([sys.executable, "-c", SAVING, json.dumps(sizes), str(folder)], check=True)
    for name in sizes:
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def experts(request: pytest.FixtureRequest, made: Path) -> Path:
    """One of them that GPTQModel quantises."""
    return made / str(request.param)


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
        assert share == 1 or ".experts." in name
        assert found.forecasts[name][2].total == pytest.approx(0.125 * share, rel=2e-3)


def test_padding_is_no_token_of_an_expert(made: Path, calibration: Batches) -> None:
    """Windows of three lengths, alone and padded to one batch, have the same second moments."""
    with quiet():
        host = GPTQModel.load(str(made / "Qwen3MoeConfig"), QuantizeConfig(bits=2, group_size=32))
    shapes = module_shapes(host)
    names = [shape.name for shape in shapes]
    alone = [torch.tensor([one["input_ids"][:length]]) for one, length in zip(calibration, LENGTHS, strict=False)]
    ids, mask = torch.zeros(2, len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, one in enumerate(alone):
        ids[row, : one.shape[1]], mask[row, : one.shape[1]] = one, 1
    found = []
    for batches in ([{"input_ids": one} for one in alone], [{"input_ids": ids, "attention_mask": mask}]):
        model = layered(host, shapes)
        # The first layer, before rounding sends tokens that are nearly between two experts another way.
        first = next(layer_inputs(model, names, model.begin(batches)))
        rows = {name: first.rows[leader].float() for name, leader in first.leaders.items()}
        found.append({name: (len(one), one.T @ one) for name, one in rows.items()})
    plain, padded = found
    assert plain.keys() == padded.keys()
    for name, (tokens, moment) in plain.items():
        assert padded[name][0] == tokens
        torch.testing.assert_close(padded[name][1], moment, rtol=0.05, atol=0.02 * float(moment.diagonal().max()))


@pytest.mark.parametrize("name", ["MixtralConfig", "DeepseekV2Config", "GptOssConfig"])
def test_ranks_under_a_budget(
    name: str, made: Path, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.WARNING)
    folder, config = tmp_path / "model", QuantizeConfig(bits=2, group_size=32)
    done = quantize(made / name, folder, config, calibration, adapter=EoRA(budget="2bpw", factor_bits=4))
    report = done.host._eora_run.allocation.report()
    assert 0.7 * report["budget"] < report["spent"] <= report["budget"]
    assert any(".experts." in module and factors.rank for module, factors in done.factors.items())
    # What few tokens reach is told of once a layer.
    told = [one.getMessage() for one in caplog.records if "calibration tokens and get small" in one.getMessage()]
    assert len(told) <= SIZES["num_hidden_layers"]
    ids = torch.tensor([calibration[0]["input_ids"][:16]])
    with torch.inference_mode():
        assert torch.isfinite(load(folder)(ids).logits).all()
    if name == "MixtralConfig":
        # GPTQModel has replaced transformers' class of its experts for this process.
        return
    # Transformers has the experts in one tensor, and makes up what it holds.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu")
    with pytest.raises(AdapterError, match=f"models of type {model.config.model_type} in one tensor"):
        load_peft(model, folder / "eora")


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_experts_that_gptqmodel_leaves_as_they_are_are_refused(name: str, made: Path, calibration: Batches) -> None:
    with quiet():
        host = GPTQModel.load(str(made / name), QuantizeConfig(bits=2, group_size=32))
    model_type = host.model.config.model_type
    with pytest.raises(NotImplementedError, match=f"of models of type {model_type} GPTQModel .* quantises no expert"):
        host.quantize(calibration, adapter=EoRA(rank=4))


def rounder(base: Path, tokenizer: Any, calibration: Batches, **options: Any) -> AutoRound:
    data = [torch.tensor([window["input_ids"]]) for window in calibration[:4]]
    return AutoRound(str(base), tokenizer=tokenizer, device_map="cpu", scheme="W4A16", group_size=32, nsamples=4,
                     seqlen=64, batch_size=4, iters=0, dataset=data,
                     alg_configs=["signround", EoRAConfig(**options)])  # fmt: skip


def test_a_budget_in_autorounds_loop(
    made: Path, tokenizer: Any, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = rounder(made / "Qwen3MoeConfig", tokenizer, calibration, budget="1bpw", factor_bits=16)
    folder = Path(asked.quantize_and_save(str(tmp_path / "out"), format="auto_round")[1])
    modules = AdapterFolder.open(folder / "eora").keys
    assert len([name for name in modules if ".experts." in name]) == 2 * 3 * EXPERTS
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu")
    adapted = load_peft(plain, folder / "eora")
    assert len([one for one in adapted.modules() if isinstance(one, LoraLayer)]) == len(modules)
    with torch.inference_mode():
        assert torch.isfinite(adapted(torch.tensor([calibration[0]["input_ids"][:16]])).logits).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [("MixtralConfig", "of type mixtral in its files, and would stop"),
     ("GptOssConfig", "no adapter in AutoRound's loop for models of type gpt_oss")],
)  # fmt: skip
def test_what_autoround_does_not_serve_is_refused(
    name: str, message: str, made: Path, tokenizer: Any, calibration: Batches, tmp_path: Path
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        rounder(made / name, tokenizer, calibration, rank=4).quantize_and_save(str(tmp_path), format="auto_round")
