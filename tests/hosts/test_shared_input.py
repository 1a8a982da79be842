"""Kernels on the CPU that read the same input, computed together."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.kernels.cpu import build
from gptqmodel_eora_ext.kernels.cpu.linear import CpuLinears
from gptqmodel_eora_ext.kernels.shared_input import share_inputs
from tests.kernels.cases import packed_weight, random_input

from .test_fused import close, expected, module

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C++ compiler")
IN = 96
OUTS = {"q_proj": 48, "k_proj": 16, "v_proj": 20}


class Attention(torch.nn.Module):
    """Three kernels that read one input; k_proj has no factors."""

    def __init__(self, *, share: bool = True, group_sizes: tuple[int, int, int] = (32, 32, 32)) -> None:
        super().__init__()
        for (name, out), group_size in zip(OUTS.items(), group_sizes, strict=True):
            weight = packed_weight(3, out, IN, group_size, sym=False)
            self.add_module(name, module(weight, adapter=name != "k_proj"))
        if share:
            share_inputs({f"layer.attention.{name}": child for name, child in self.named_children()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of the kernels computed."""
    made: list[int] = []

    def counted(method: Any) -> Any:
        def call(self: CpuLinears, *args: Any) -> Any:
            made.append(len(self._layers))
            return method(self, *args)

        return call

    for name in ("codes", "matmul", "tiles"):
        monkeypatch.setattr(CpuLinears, name, counted(getattr(CpuLinears, name)))
    return made


def check(model: Any, x: torch.Tensor) -> None:
    for name, y in zip(OUTS, model(x).split(list(OUTS.values()), -1), strict=True):
        kernel = model.get_submodule(name)
        assert close(y, expected(kernel, kernel.packed(), x)), name


@torch.no_grad()
def test_one_call_for_all_that_read_an_input(calls: list[int]) -> None:
    model = Attention()
    for shape in ((1, IN), (2, 3, IN), (300, IN)):
        x = random_input(torch.Size(shape[:-1]).numel(), IN).view(shape)
        y = model(x)
        check(model, x)
        assert torch.equal(y, Attention(share=False)(x))
    assert calls == [3, 3, 1, 1, 1] * 3
    assert all(child.shared._waiting is None for child in model.children())


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 40])
def test_bfloat16(rows: int, calls: list[int]) -> None:
    x = random_input(rows, IN, torch.bfloat16)
    y, alone = Attention()(x).float(), Attention(share=False)(x).float()
    assert calls == [3, 1, 1, 1] and float((y - alone).norm()) <= 4e-3 * float(alone.norm())


@torch.no_grad()
def test_groups_that_differ_go_alone(calls: list[int]) -> None:
    check(Attention(group_sizes=(32, 32, 16)), random_input(1, IN))
    assert calls == [1, 1, 1]


@torch.no_grad()
def test_modules_that_turn_out_to_read_other_inputs() -> None:
    model = Attention()
    first, second = random_input(1, IN), random_input(1, IN, seed=9)
    for _ in range(2):
        assert close(model.q_proj(first), expected(model.q_proj, model.q_proj.packed(), first))
        assert close(model.k_proj(second), expected(model.k_proj, model.k_proj.packed(), second))
    check(model, first)


@torch.no_grad()
def test_an_input_written_to_in_between() -> None:
    model, x = Attention(), random_input(1, IN)
    model.q_proj(x)
    x *= 2
    assert close(model.k_proj(x), expected(model.k_proj, model.k_proj.packed(), x))


@torch.no_grad()
def test_an_adapter_taken_away_or_changed(calls: list[int]) -> None:
    model, x = Attention(), random_input(1, IN)
    check(model, x)
    model.q_proj.adapter.lora_B.mul_(2)
    model.v_proj.adapter = None
    check(model, x)
    assert calls == [3, 3]


@torch.no_grad()
def test_weights_loaded_and_moved(calls: list[int]) -> None:
    model, x = Attention(), random_input(1, IN)
    model.q_proj(x)
    model.k_proj.load_state_dict(module(packed_weight(3, OUTS["k_proj"], IN, 32, sym=False, seed=9)).state_dict())
    check(model, x)
    check(model.float(), x)
    assert calls == [3, 3, 3]
    # Inputs in another order of groups cannot be shared any more.
    shuffled = packed_weight(3, OUTS["k_proj"], IN, 32, sym=False, desc_act=True)
    model.k_proj.load_state_dict(module(shuffled).state_dict())
    check(model, x)
    assert calls[-3:] == [1, 1, 1]


def test_gradients_go_alone(calls: list[int]) -> None:
    model, x = Attention(), random_input(2, IN)
    model(x)
    inputs = x.clone().requires_grad_()
    model(inputs).square().sum().backward()
    wanted = x.clone().requires_grad_()
    Attention(share=False)(wanted).square().sum().backward()
    assert close(inputs.grad, wanted.grad)
    adapter = model.q_proj.adapter
    adapter.lora_A, adapter.lora_B = adapter.lora_A.float().clone().requires_grad_(), adapter.lora_B.float()
    model(x).sum().backward()
    assert adapter.lora_A.grad is not None
    with torch.no_grad():
        calls.clear()
        check(model, x)
    assert calls == [3]


@torch.no_grad()
def test_copies_and_pickles_are_alone(calls: list[int]) -> None:
    model, x = Attention(), random_input(1, IN)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
    assert calls == [3] + [1] * 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inside_a_compiled_model(mode: Any, backend: str, calls: list[int]) -> None:
    torch._dynamo.reset()
    model = Attention()
    compiled = torch.compile(model, backend=backend)
    with mode():
        for seed in range(3):
            x = random_input(2, IN, seed=seed)
            assert torch.equal(compiled(x), Attention(share=False)(x))
    assert calls == [3, 1, 1, 1] * 3
