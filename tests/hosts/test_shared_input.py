"""Kernels on the CPU that read the same input, computed together."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.kernels.cpu import build
from gptqmodel_eora_ext.kernels.cpu.linear import CpuLinears
from gptqmodel_eora_ext.kernels.shared_input import MOST_COMPARED_BYTES, share_inputs
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
    assert all(child.shared._mine.kept is None for child in model.children())


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


def right(model: Any, name: str, x: torch.Tensor) -> bool:
    """Whether one module's y is that of the oracle for x, and its weight and adapter as they are now."""
    kernel = model.get_submodule(name)
    return close(kernel(x), expected(kernel, kernel.packed(), x))


@torch.no_grad()
def test_modules_that_turn_out_to_read_other_inputs() -> None:
    model = Attention()
    first, second = random_input(1, IN), random_input(1, IN, seed=9)
    for _ in range(2):
        assert right(model, "q_proj", first) and right(model, "k_proj", second)
    check(model, first)


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda x: x.mul_(2),
    "by a view": lambda x: x.view(-1)[3:5].zero_(),
    "uncounted": lambda x: x.data.mul_(2),
    "by numpy": lambda x: x.numpy().fill(0.5),
    "one number": lambda x: x[0, :1].neg_(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES)
def test_an_input_written_to_in_between(write: str, mode: Any) -> None:
    model = Attention()
    with mode():
        x = random_input(1, IN)
        model.q_proj(x)
        WRITES[write](x)
        assert right(model, "k_proj", x) and right(model, "v_proj", x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_too_large_to_compare_or_with_gaps_goes_alone(mode: Any, calls: list[int]) -> None:
    model = Attention()
    with mode():
        large = random_input(MOST_COMPARED_BYTES // (4 * IN) + 1, IN)
        for x in (large, random_input(1, 2 * IN).view(2, IN)[:, :].T.contiguous().T):
            calls.clear()
            check(model, x)
            assert calls == [1, 1, 1]


@torch.no_grad()
def test_what_a_module_is_made_of_changes_in_between() -> None:
    """Its adapter, a factor, its scales or its bias: the kept y is not given out, with those of the others it is."""
    x = random_input(1, IN)

    def adapter_gone(kernel: Any) -> None:
        kernel.adapter = None

    changes: list[Callable[[Any], Any]] = [
        adapter_gone,
        lambda kernel: kernel.adapter.lora_B.mul_(2),
        lambda kernel: kernel.scales.mul_(2),
        lambda kernel: kernel.bias.add_(1),
    ]
    for change in changes:
        model = Attention()
        model.q_proj(x)
        change(model.v_proj)
        assert right(model, "v_proj", x) and right(model, "k_proj", x)
        check(model, x)


@torch.no_grad()
def test_sharing_comes_back(calls: list[int]) -> None:
    """After an exception between two modules, and after inputs that were not shared."""
    model, x = Attention(), random_input(1, IN)
    model.q_proj(x)  # and here the caller's exception
    for seed in range(3):
        check(model, random_input(1, IN, seed=seed))
    assert calls == [3, 1, 1, 1, 3, 3]
    for seed in range(40):
        right(model, "q_proj", random_input(1, IN, seed=seed))
        right(model, "k_proj", random_input(1, IN, seed=seed + 100))
    assert calls[6:].count(3) < 8
    calls.clear()
    for seed in range(60):
        check(model, random_input(1, IN, seed=seed))
    assert calls[-5:] == [3] * 5


def test_two_threads_share_each_its_own(calls: list[int]) -> None:
    model = Attention()
    inputs = [[random_input(1, IN, seed=100 * thread + seed) for seed in range(30)] for thread in range(2)]
    wanted = [[Attention(share=False)(x) for x in mine] for mine in inputs]
    calls.clear()
    meet, wrong = threading.Barrier(2), []

    def run(thread: int) -> None:
        with torch.inference_mode():
            for x, y in zip(inputs[thread], wanted[thread], strict=True):
                meet.wait()
                q = model.q_proj(x)
                meet.wait()
                found = torch.cat([q, model.k_proj(x), model.v_proj(x)], -1)
                wrong.extend([] if close(found, y.double()) else [thread])

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert wrong == [] and calls == [3] * 60


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
        for seed in range(3):
            check(model, random_input(2, IN, seed=seed))
    assert calls[-1] == 3


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
