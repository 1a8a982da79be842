"""Checkpoints that the plugin writes, served by vLLM: token by token what torch computes with Ŵ + B A in float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vllm_reference import dense_model, greedy, losses
from benchmarks.vllm_tools import Server

pytestmark = pytest.mark.vllm

# Nats that a token may be off in float32.
TOLERANCE = 2e-3
TOKENS = 16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# `lm_head` is left out: vLLM 0.32 cannot give prompts' losses with a LoRA on it.
LORAS = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 16, "lora_target_modules": LINEARS}

CASES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "2 bits": ({"rank": 32}, {"bits": 2, "group_size": 64}),
    "3 bits asymmetric, packed 4": ({"rank": 20, "factor_bits": 4}, {"bits": 3, "group_size": 32, "sym": False}),
    "4 bits desc_act, packed 8": (
        {"rank": 20, "factor_bits": 8},
        {"bits": 4, "group_size": 64, "desc_act": True, "act_group_aware": False},
    ),
    "8 bits, a scale a row": ({"rank": 8}, {"bits": 8, "group_size": -1, "act_group_aware": False}),
    "2 bits, no adapter": (None, {"bits": 2, "group_size": 64}),
    "mixed": (
        {"budget": "0.5bpw", "factor_bits": 4},
        {"bits": 2, "group_size": 64, "dynamic": {
            r"+:.*k_proj": {"bits": 4}, r"+:.*v_proj": {"bits": 3, "group_size": 32}, r"+:.*gate_proj": {"bits": 3},
            r"-:.*layers\.1\.mlp\.(up|down)_proj": {},
        }},
    ),
}  # fmt: skip


def check(answer: dict[str, Any], prompts: list[list[int]], models: list[Any]) -> None:
    """Compare what was served for each prompt with a model's."""
    assert "error" not in answer, answer["error"]
    for ids, served, generated, model in zip(prompts, answer["losses"], answer["generated"], models, strict=True):
        expected = losses(model, ids)
        assert max(abs(one - other) for one, other in zip(served, expected, strict=True)) <= TOLERANCE
        assert generated == greedy(model, ids, len(generated))


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_served(case: str, server: Server, checkpoints: Any, prompts: list[list[int]]) -> None:
    adapter, config = CASES[case]
    folder = checkpoints(case, adapter, **config)
    models = [dense_model(folder, *(() if adapter is None else ("own",)))] * len(prompts)
    check(server.ask(folder, prompts, losses=True, tokens=TOKENS), prompts, models)


def test_compiled(server: Server, checkpoints: Any, prompts: list[list[int]]) -> None:
    """By default vLLM compiles a model; the plugin's layers are operators in it."""
    folder = checkpoints("mixed", *CASES["mixed"][:1], **CASES["mixed"][1])
    answer = server.ask(folder, prompts, losses=True, tokens=TOKENS, options={"enforce_eager": False})
    check(answer, prompts, [dense_model(folder, "own")] * len(prompts))


def test_what_users_say_of_the_format(server: Server, checkpoints: Any, prompts: list[list[int]]) -> None:
    """`--quantization gptq` names the format, and does not leave the adapter out; another method is refused."""
    folder = checkpoints("4 bits", {"rank": 16}, bits=4, group_size=64)
    answer = server.ask(folder, prompts[1:], losses=True, options={"quantization": "gptq"})
    check(answer, prompts[1:], [dense_model(folder, "own")])
    refused = server.ask(folder, prompts[1:], options={"quantization": "moe_wna16"})
    assert "names an adapter, which --quantization moe_wna16 would leave out" in refused["error"]


def test_adapters_that_requests_choose(
    server: Server, checkpoints: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Adapters made for the checkpoint take its own's place, others are added, and a batch may mix them all."""
    folder = checkpoints("2 bits", *CASES["2 bits"][:1], **CASES["2 bits"][1])
    first = checkpoints.adapter("first", folder, rank=16)
    second = checkpoints.adapter("second", folder, rank=8)
    added = tmp_path / "added"
    shutil.copytree(first, added)
    (added / "eora.json").unlink()
    own, with_first, with_second = dense_model(folder, "own"), dense_model(folder, first), dense_model(folder, second)
    both = dense_model(folder, "own", added)
    long, short = prompts
    for worn, models in (
        ((first, first), (with_first, with_first)),
        ((None, first), (own, with_first)),
        ((first, second, None), (with_first, with_second, own)),
        ((added, None), (both, own)),
        ((added, second), (both, with_second)),
    ):
        asked = [long, short, short][: len(worn)]
        loras = [None if one is None else str(one) for one in worn]
        answer = server.ask(folder, asked, losses=True, tokens=TOKENS, loras=loras, options=LORAS)
        check(answer, asked, list(models))


def test_adapters_of_requests_that_are_refused(
    server: Server, checkpoints: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    folder = checkpoints("2 bits", *CASES["2 bits"][:1], **CASES["2 bits"][1])
    first = checkpoints.adapter("first", folder, rank=16)
    packed = checkpoints.adapter("packed", folder, rank=16, factor_bits=4)
    other = tmp_path / "other"
    shutil.copytree(first, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["lm_head"]}))

    def refused(lora: Path, **options: Any) -> str:
        found = server.ask(folder, prompts[1:], loras=[str(lora)], options={**LORAS, **options})
        return str(found.get("error"))

    assert "rank 16 is greater than max_lora_rank 8" in refused(first, max_lora_rank=8)
    assert "factors in 4 bits" in refused(packed)
    assert "adapts none of the" in refused(other)
    assert "to which vLLM adds no LoRA here" in refused(first, lora_target_modules=["q_proj"])


def damage(checkpoint: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a checkpoint whose adapter is changed."""
    shutil.copytree(checkpoint, folder)
    change(folder / "eora")
    return folder


def truncate(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def of_a_newer_version(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    packed = {"peft_type": "EORA", "factor_bits": 4, "factor_group_size": 32}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **packed}))


@pytest.mark.parametrize(
    ("change", "told"),
    ((shutil.rmtree, "is no folder"), (truncate, "truncated"), (of_a_newer_version, "newer gptqmodel-eora-ext")),
)
def test_a_checkpoint_without_its_adapter_is_refused(
    change: Callable[[Path], None],
    told: str,
    server: Server,
    checkpoints: Any,
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    """By the process that the user started, before it is ready; never served without its adapter."""
    folder = damage(checkpoints("2 bits", *CASES["2 bits"][:1], **CASES["2 bits"][1]), tmp_path / "out", change)
    assert told in server.ask(folder, prompts[1:])["error"]
