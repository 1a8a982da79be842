"""Mixtures of experts in both hosts: made by default and by a plan, saved, opened, and computed in three ways.

Random models of two layers of four architectures. A process for each host, since each replaces classes of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .conftest import Steps
from .steps import OF_AUTOROUND, OF_GPTQMODEL, STEPS, Found

pytestmark = pytest.mark.families

TYPES = ("qwen3_moe", "mixtral", "deepseek_v2", "gpt_oss")
# Logits are nearer to each other than this share of what the adapter changes in them: hosts compute in 16 bits, the
# third way in 32.
NEAR = 0.2

Finds = Callable[[str, str], Found]


@pytest.fixture(scope="module")
def finds(tmp_path_factory: pytest.TempPathFactory, run_step: Steps) -> Finds:
    """What a step found of a model type; all steps have been run."""
    folder = tmp_path_factory.mktemp("figure")
    for step in ("make", *STEPS):
        run_step(folder, step, TYPES)
    return lambda step, model_type: Found(folder, step, model_type).read()


def assert_near(one: torch.Tensor, other: torch.Tensor, unadapted: torch.Tensor) -> None:
    changed = float((other - unadapted).norm())
    assert changed > 0
    assert torch.isfinite(one).all()
    assert float((one - other).norm()) < NEAR * changed


@pytest.mark.parametrize("model_type", TYPES)
def test_models_are_made(model_type: str, finds: Finds) -> None:
    assert not finds("make", model_type).refused


@pytest.mark.parametrize("case", OF_GPTQMODEL)
@pytest.mark.parametrize("model_type", TYPES)
def test_gptqmodels_loop_and_plans(model_type: str, case: str, finds: Finds) -> None:
    """`EoRA()` and `eora plan`: GPTQModel with the plugin, GPTQModel without it, and Ŵ + BA computed apart."""
    own, apart, without = (finds(step, model_type) for step in ("gptqmodel", "apart", "without"))
    assert case not in own.refused
    unadapted = own.logits[f"{case} without"]
    assert_near(own.logits[case], apart.logits[case], unadapted)
    assert_near(without.logits[case], apart.logits[case], unadapted)


@pytest.mark.parametrize("case", OF_GPTQMODEL)
@pytest.mark.parametrize("model_type", TYPES)
def test_what_cannot_open_gptqmodels_checkpoints_refuses(model_type: str, case: str, finds: Finds) -> None:
    """Packed factors need the plugin; and transformers has experts in one tensor, into which it reads none."""
    found = finds("without", model_type)
    assert "eora" in found.refused[f"{case} as it is"]
    assert f"models of type {model_type} in one tensor" in found.refused[f"{case} in transformers"]


@pytest.mark.parametrize("case", OF_AUTOROUND)
@pytest.mark.parametrize("model_type", [one for one in TYPES if one != "mixtral"])
def test_autorounds_loop(model_type: str, case: str, finds: Finds) -> None:
    """Transformers with `load_peft`, Ŵ + BA computed apart, and GPTQModel, where it does not refuse."""
    own, apart, opened = (finds(step, model_type) for step in ("autoround", "apart", "gptqmodel"))
    unadapted = own.logits[f"{case} without"]
    assert_near(own.logits[case], apart.logits[case], unadapted)
    if model_type == "gpt_oss":
        assert "splits the joined matrices of experts" in opened.refused[case]
    else:
        assert_near(opened.logits[case], apart.logits[case], unadapted)


@pytest.mark.parametrize("case", OF_AUTOROUND)
def test_autoround_does_not_find_mixtrals_experts(case: str, finds: Finds) -> None:
    assert "of type mixtral in its files, and would stop" in finds("autoround", "mixtral").refused[case]
