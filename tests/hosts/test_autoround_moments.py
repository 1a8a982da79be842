"""Stage by stage over AutoRound's runner: what is summed, and what is reused, is what whole forwards would give."""

from typing import Any

import pytest
import torch
from auto_round.algorithms.block_runner import BlockForwardRunner
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from gptqmodel_eora_ext.capture import OutputErrorMoment, SecondMoment
from gptqmodel_eora_ext.hosts.autoround.moments import BlockInputs

SAMPLES, TOKENS, HIDDEN = 5, 12, 16


@pytest.fixture
def block() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=40, num_attention_heads=2, num_key_value_heads=1)
    config._attn_implementation = "sdpa"
    return LlamaDecoderLayer(config, layer_idx=0).eval()


@pytest.fixture
def held(block: torch.nn.Module) -> tuple[BlockInputs, dict[str, Any], Any, tuple[Any, Any]]:
    config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=2)
    inputs = [torch.randn(1, TOKENS, HIDDEN) for _ in range(SAMPLES)]
    others = {"position_embeddings": LlamaRotaryEmbedding(config)(inputs[0], torch.arange(TOKENS)[None]),
              "positional_inputs": []}  # fmt: skip
    modules = {name: one for name, one in block.named_modules() if isinstance(one, torch.nn.Linear)}
    runner = BlockForwardRunner(batch_size=2, amp=False, enable_torch_compile=False)
    return BlockInputs(block, modules, runner, inputs, others, None), modules, runner, (inputs, others)


def whole_forward(block: torch.nn.Module, module: torch.nn.Module, runner: Any, data: tuple[Any, Any]) -> torch.Tensor:
    """C of a module by plain forwards."""
    moment = SecondMoment(module.in_features, "")  # type: ignore[arg-type]
    handle = module.register_forward_pre_hook(lambda _, args: moment.add(args[0]))
    with torch.no_grad():
        runner(block, *data)
    handle.remove()
    return moment.mean()


def test_every_stage_and_the_outputs_see_what_was_compensated(block: torch.nn.Module, held: Any) -> None:
    inputs, modules, runner, data = held
    stages = inputs.stages()
    assert [len(stage) for stage in stages] == [3, 1, 2, 1]
    calls = dict.fromkeys(modules, 0)
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    for stage in stages:
        found = inputs.moments(stage)
        for name in stage:
            modules[name].weight.data = modules[name].weight.data * 1.1
        inputs.compensated(stage)
        counted = dict(calls)
        for name in stage:
            # Between passes no batch is under way, so that nothing is reused; and a stage's inputs are not of its own
            # weights.
            expected = whole_forward(block, modules[name], runner, data)
            torch.testing.assert_close(found[name].mean(), expected, rtol=1e-5, atol=1e-6)
        calls.update(counted)
    inputs.expect_outputs()
    before = dict(calls)
    with torch.no_grad():
        reused = runner(block, *data)
        assert calls["self_attn.q_proj"] == before["self_attn.q_proj"]
        assert calls["mlp.down_proj"] == before["mlp.down_proj"] + 3
        # Other inputs are not taken for the known ones.
        others = [one + 1 for one in data[0]]
        moved = runner(block, others, data[1])
    inputs.release()
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(reused), torch.cat(runner(block, *data)), rtol=0, atol=0)
        torch.testing.assert_close(torch.cat(moved), torch.cat(runner(block, others, data[1])), rtol=0, atol=0)
    assert "forward" not in vars(block.self_attn)  # type: ignore[arg-type]


def test_an_error_moment_is_summed_where_it_is_asked_for(block: torch.nn.Module, held: Any) -> None:
    inputs, modules, runner, data = held
    name = "mlp.down_proj"
    weight = modules[name].weight.data
    quantized = weight.round(decimals=1)
    asked: list[str] = []

    def errors(module: str) -> OutputErrorMoment | None:
        asked.append(module)
        return OutputErrorMoment(weight, quantized, module) if module == name else None

    found = {stage[0]: inputs.moments(stage, errors)[stage[0]] for stage in inputs.stages()}
    assert asked == ["self_attn.o_proj", name]
    assert isinstance(found["self_attn.o_proj"], SecondMoment)
    delta = weight - quantized
    expected = delta @ whole_forward(block, modules[name], runner, data) @ delta.T
    torch.testing.assert_close(found[name].mean(), expected, rtol=1e-4, atol=1e-7)
    assert found[name].tokens == SAMPLES * TOKENS
