"""Mixtures of experts in both hosts: made by default and by a plan, saved, opened, and computed in three ways.

Random models of two layers of four architectures. A process for each host, since each replaces classes of transformers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .conftest import Steps
from .steps import OF_AUTOROUND, OF_GPTQMODEL, STEPS, Found, assert_near

pytestmark = pytest.mark.families

TYPES = ("qwen3_moe", "mixtral", "deepseek_v2", "gpt_oss")
# Others that docs/autoround.md lists: what AutoRound's loop refuses of them, a model in its files or a budget; and what
# it serves.
ALSO_REFUSED = {
    "phimoe": "of type phimoe in its files, and would stop",
    "minimax_m2": "of type minimax_m2 in its files, and would stop",
    "qwen3_5_moe": "AutoRound hands on none (of models that also see it does not)",
}
OTHERS = ("cohere2_moe", "deepseek_v3", "dots1", "hunyuan_v1_moe", "llama4_text", "olmoe", "qwen2_moe", "solar_open")
Finds = Callable[[str, str], Found]


@pytest.fixture(scope="module")
def finds(tmp_path_factory: pytest.TempPathFactory, run_step: Steps) -> Finds:
    """What a step found of a model type; all steps have been run."""
    folder = tmp_path_factory.mktemp("figure")
    for step in ("make", *STEPS):
        run_step(folder, step, TYPES)
    return lambda step, model_type: Found(folder, step, model_type).read()


@pytest.mark.parametrize("model_type", TYPES)
def test_models_are_made(model_type: str, finds: Finds) -> None:
    assert not finds("make", model_type).refused


@pytest.mark.parametrize("case", OF_GPTQMODEL)
@pytest.mark.parametrize("model_type", TYPES)
def test_gptqmodels_loop_and_plans(model_type: str, case: str, finds: Finds) -> None:
    """`EoRA()`, `eora plan` and a rank: GPTQModel with the plugin, and Ŵ + BA computed apart."""
    own, apart = finds("gptqmodel", model_type), finds("apart", model_type)
    assert case not in own.refused
    assert_near(own.logits[f"{case} logits"], apart.logits[f"{case} logits"], own.logits[f"{case} without"])


@pytest.mark.parametrize("case", OF_GPTQMODEL)
@pytest.mark.parametrize("model_type", TYPES)
def test_gptqmodels_checkpoints_where_the_plugin_is_off(model_type: str, case: str, finds: Finds) -> None:
    """GPTQModel opens plain factors, and refuses packed ones."""
    found, own = finds("without", model_type), finds("gptqmodel", model_type)
    if case == "plain":
        assert_near(found.logits[f"{case} logits"], own.logits[f"{case} logits"], own.logits[f"{case} without"])
    else:
        assert "Compatible adapters include" in found.refused[f"{case} logits"]
    # Transformers has experts in one tensor, into which it reads none. Of mixed widths it tells so itself.
    refused = found.refused[f"{case} in transformers"]
    assert f"models of type {model_type} in one tensor" in refused or "ignore_mismatched_sizes" in refused


@pytest.mark.parametrize("case", OF_AUTOROUND)
@pytest.mark.parametrize("model_type", TYPES)
def test_autorounds_loop(model_type: str, case: str, finds: Finds) -> None:
    """Transformers with `load_peft`, Ŵ + BA computed apart, and GPTQModel, where it does not refuse."""
    own, apart, opened = (finds(step, model_type) for step in ("autoround", "apart", "gptqmodel"))
    if model_type == "mixtral" and case != "memory":
        assert "of type mixtral in its files, and would stop" in own.refused[case]
        return
    expected, unadapted = apart.logits[f"{case} logits"], own.logits[f"{case} without"]
    assert_near(own.logits[f"{case} logits"], expected, unadapted)
    if model_type == "gpt_oss":
        assert "splits the joined matrices of experts" in opened.refused[case]
    elif model_type == "mixtral":
        assert case in opened.refused
    else:
        assert_near(opened.logits[f"{case} logits"], expected, unadapted)


@pytest.fixture(scope="module")
def finds_others(tmp_path_factory: pytest.TempPathFactory, run_step: Steps) -> Finds:
    folder = tmp_path_factory.mktemp("others")
    for step in ("make", "autoround", "apart"):
        run_step(folder, step, [*OTHERS, *ALSO_REFUSED])
    return lambda step, model_type: Found(folder, step, model_type).read()


@pytest.mark.parametrize("case", OF_AUTOROUND)
@pytest.mark.parametrize("model_type", OTHERS)
def test_others_in_autorounds_loop(model_type: str, case: str, finds_others: Finds) -> None:
    own, apart = finds_others("autoround", model_type), finds_others("apart", model_type)
    assert_near(own.logits[f"{case} logits"], apart.logits[f"{case} logits"], own.logits[f"{case} without"])


@pytest.mark.parametrize("model_type", ALSO_REFUSED)
def test_others_that_autorounds_loop_refuses(model_type: str, finds_others: Finds) -> None:
    found = finds_others("autoround", model_type)
    assert ALSO_REFUSED[model_type] in found.refused["budget"]
    served = "rank" if model_type == "qwen3_5_moe" else "memory"
    assert torch.isfinite(found.logits[f"{served} logits"]).all()
