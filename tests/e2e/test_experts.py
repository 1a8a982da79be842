"""Mixtures of experts: budgets in both loops, padding among routed tokens, and what is refused by name."""

from __future__ import annotations

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

from gptqmodel_eora_ext import EoRA, EoRAConfig, Plan, load_peft, prune
from gptqmodel_eora_ext.adapter.errors import AdapterError
from gptqmodel_eora_ext.adapter.folder import AdapterFolder
from gptqmodel_eora_ext.evaluate.sparsity import examine_model
from gptqmodel_eora_ext.hosts.gptqmodel.modules import layered, module_shapes
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.loop.run import write_adapter
from gptqmodel_eora_ext.plan.survey import first_tokens
from gptqmodel_eora_ext.plan.sweep import Question, Rounding, layer_inputs, sweep
from gptqmodel_eora_ext.solve import Grid

from ..families.models import EXPERTS, LAYERS, ROUTED
from ..families.steps import logits, windows
from .helpers import Batches, kernels, load, quantize

pytestmark = pytest.mark.e2e

LENGTHS = (40, 64, 17)
TYPES = ("qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss")
# GPTQModel quantises no expert of these.
LEFT_ALONE = ("granitemoe", "minimax_m2")
# Sees, too; so its layers lie one deeper.
SEEING = "qwen3_vl_moe"
# GPTQModel looks for its layers where its authors' own code has them, and transformers' has not.
ELSEWHERE = "nemotron_h"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny random models whose experts lie in one tensor in transformers, by their types."""
    folder = tmp_path_factory.mktemp("experts")
    # In a process of its own: where GPTQModel is imported, transformers saves experts in another layout than hubs hold.
    words = [sys.executable, "-m", "tests.families", "make", str(folder), *TYPES, *LEFT_ALONE, SEEING, ELSEWHERE]
    subprocess.run(words, check=True, cwd=ROOT)
    return folder / "base"


@pytest.fixture(scope="module")
def calibration() -> Batches:
    return windows()


@pytest.fixture(scope="module", params=TYPES)
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
    question = Question(
        lambda name: Rounding((2,), Grid(32)), lambda name, bits: 8, lambda name, weight, moment: weight * 0.5
    )
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
        host = GPTQModel.load(str(made / "qwen3_moe"), QuantizeConfig(bits=2, group_size=32))
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


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_ranks_by_default(
    name: str, made: Path, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.WARNING)
    folder, config = tmp_path / "model", QuantizeConfig(bits=2, group_size=32)
    done = quantize(made / name, folder, config, calibration, adapter=EoRA())
    report = done.host._eora_run.allocation.report()
    assert 0.5 * report["budget"] < report["spent"] <= report["budget"]
    if name != "deepseek_v2":
        # There the attention, of more modules, is worth more than any expert.
        assert any(".experts." in module and factors.rank for module, factors in done.factors.items())
    # What few tokens reach is told of once a layer.
    told = [one.getMessage() for one in caplog.records if "calibration tokens and get small" in one.getMessage()]
    assert len(told) <= LAYERS
    assert torch.isfinite(logits(load(folder))).all()
    if name == "mixtral":
        # GPTQModel has replaced transformers' class of its experts for this process.
        return
    # Transformers has the experts in one tensor, and makes up what it holds: whatever the adapter has factors for.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu")
    attention = {module: factors for module, factors in done.factors.items() if ".experts." not in module}
    write_adapter(folder, folder / "attention", attention, list(done.factors), {}, base_model=folder)
    for adapter in ("eora", "attention"):
        with pytest.raises(AdapterError, match=f"models of type {model.config.model_type} in one tensor"):
            load_peft(model, folder / adapter)


@pytest.mark.parametrize("name", ["deepseek_v2", "gpt_oss", SEEING])
def test_a_plan(name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`eora plan`, and `eora quantize` by the plan."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # In a process of its own: where AutoRound has run before, GPTQModel sees nothing of what the last expert reads.
    words = "import sys, pathlib, tests.families.steps as steps; steps.by_plan(*map(pathlib.Path, sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", words, str(made / name), str(tmp_path / "model")], check=True, cwd=ROOT)
    plan = Plan.read(tmp_path / "model.json")
    assert any(".experts." in module and one.rank for module, one in plan.modules.items())
    model = load(tmp_path / "model")
    adapted = {name for name, kernel in kernels(model).items() if kernel.adapter.lora_A is not None}
    assert adapted == {module for module, one in plan.modules.items() if one.rank}
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [*((name, f"of models of type {name} GPTQModel .* quantises no expert") for name in LEFT_ALONE),
     (ELSEWHERE, f"looks for the layers of a model of type {ELSEWHERE} at backbone.layers, where this transformers")],
)  # fmt: skip
def test_what_gptqmodel_does_not_serve_is_refused(
    name: str, message: str, made: Path, calibration: Batches
) -> None:
    with quiet():
        host = GPTQModel.load(str(made / name), QuantizeConfig(bits=2, group_size=32))
    with pytest.raises(NotImplementedError, match=message):
        host.quantize(calibration, adapter=EoRA(rank=4))


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 32}], ids=["pruned", "and quantised"])
def test_experts_are_pruned(options: dict[str, Any], made: Path, calibration: Batches, tmp_path: Path) -> None:
    with quiet():
        folder = prune(str(made / "qwen3_moe"), tmp_path / "model", calibration, adapter={"rank": 4}, **options)
    examined = examine_model(folder)
    assert examined is not None and not examined.broken
    assert len([name for name in examined.modules if ".experts." in name]) == 2 * 3 * EXPERTS
    assert set(AdapterFolder.open(folder / "eora").keys) == set(examined.modules)


def rounder(base: Path, calibration: Batches, **options: Any) -> AutoRound:
    data = [torch.tensor([window["input_ids"]]) for window in calibration[:4]]
    return AutoRound(str(base), device_map="cpu", scheme="W4A16", group_size=32, nsamples=4, seqlen=64, batch_size=4,
                     iters=0, disable_opt_rtn=True, dataset=data,
                     alg_configs=["signround", EoRAConfig(**options)])  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_budget_in_autorounds_loop(
    name: str, made: Path, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.WARNING)
    asked = rounder(made / name, calibration, budget="1bpw", factor_bits=16)
    folder = Path(asked.quantize_and_save(str(tmp_path / "out"), format="auto_round")[1])
    told = any("opens in transformers" in one.getMessage() and "not in GPTQModel" in one.getMessage()
               for one in caplog.records)  # fmt: skip
    assert told == (name == "gpt_oss")
    modules = AdapterFolder.open(folder / "eora").keys
    assert len([module for module in modules if ".experts." in module]) == LAYERS * 3 * EXPERTS
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu")
    adapted = load_peft(plain, folder / "eora")
    assert len([one for one in adapted.modules() if isinstance(one, LoraLayer)]) == len(modules)
    assert torch.isfinite(logits(adapted)).all()
    if name == "gpt_oss":
        with pytest.raises(NotImplementedError, match="splits the joined matrices of experts in models of type"):
            load(folder)


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [("mixtral", "auto_round", "of type mixtral in its files, and would stop"),
     ("gpt_oss", "auto_gptq", "nothing opens an export of a model of type gpt_oss in the format `auto_gptq`")],
)  # fmt: skip
def test_what_autoround_does_not_serve_is_refused(
    name: str, form: str, message: str, made: Path, calibration: Batches, tmp_path: Path
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        rounder(made / name, calibration, rank=4).quantize_and_save(str(tmp_path), format=form)
