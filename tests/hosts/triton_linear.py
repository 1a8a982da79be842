"""`EoRATritonLinear` and `EoRA.apply` on a GPU or by Triton's interpreter: run by `test_triton.py` in its own process.

python -m pytest tests/hosts/triton_linear.py                        on a GPU
TRITON_INTERPRET=1 python -m pytest tests/hosts/triton_linear.py     anywhere
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.formats.factors import QuantizedFactor
from gptqmodel_eora_ext.formats.packed_weights import LayoutError, PackedWeight
from gptqmodel_eora_ext.hosts.gptqmodel.triton import EoRATritonLinear
from gptqmodel_eora_ext.kernels.reference import linear
from gptqmodel_eora_ext.kernels.shared_input import share_inputs
from gptqmodel_eora_ext.kernels.triton import adding, ops
from tests.kernels.on_device import DEVICE, packed_weight, random_factors, random_input

IN = 64
OUTS = {"q_proj": 48, "k_proj": 16, "v_proj": 16}


class Launches:
    """Counts the calls of one of the plugin's launches."""

    def __init__(self, module: Any = ops, name: str = "_linears") -> None:
        self.count = 0
        self._module, self._name = module, name
        self._original = getattr(module, name)

    def __enter__(self) -> Launches:
        def counting(*args: Any) -> Any:
            self.count += 1
            return self._original(*args)

        setattr(self._module, self._name, counting)
        return self

    def __exit__(self, *_: Any) -> None:
        setattr(self._module, self._name, self._original)


def kernel(cls: Any, out: int, *, bits: int = 2, rank: int = 5, factor_bits: int = 16, seed: int = 0) -> Any:
    """A kernel as loading leaves it, and nothing moved to a GPU."""
    weight = packed_weight(bits, out, IN, 32, sym=False, seed=seed)
    made = cls(
        bits=bits, group_size=32, sym=False, desc_act=False, in_features=IN, out_features=out, bias=True,
        pack_dtype=torch.int32, adapter=EoRA(rank=rank), name=f"layer.{out}",
    )  # fmt: skip
    made.qweight, made.qzeros, made.scales = weight.qweight, weight.qzeros, weight.scales
    made.bias = torch.linspace(-1, 1, out, device=DEVICE)
    factors = random_factors(weight, rank, factor_bits, seed=seed + 1)
    down, up = factors.dense()
    made.adapter.lora_A, made.adapter.lora_B = down.T, up.contiguous()
    if isinstance(factors.down, QuantizedFactor) and isinstance(factors.up, QuantizedFactor):
        made.adapter.packed = (factors.down, factors.up)
    return made.eval().to(DEVICE)


def expected(made: Any, x: torch.Tensor) -> torch.Tensor:
    weight = PackedWeight(made.qweight, made.qzeros, made.scales, made.g_idx, made.bits, 32, IN, made.out_features)
    y = linear(x, weight, None, made.bias)
    return y if made.adapter is None else y + (x @ made.adapter.lora_A) @ made.adapter.lora_B


class Attention(torch.nn.Module):
    """Three kernels that read one input."""

    def __init__(self, factor_bits: int = 16) -> None:
        super().__init__()
        for index, (name, out) in enumerate(OUTS.items()):
            self.add_module(name, kernel(EoRATritonLinear, out, rank=3 + index, factor_bits=factor_bits, seed=index))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def shared(model: torch.nn.Module) -> torch.nn.Module:
    share_inputs({f"attention.{name}": child for name, child in model.named_children()})
    return model


def check(model: Any, x: torch.Tensor) -> None:
    wanted = torch.cat([expected(model.get_submodule(name), x) for name in OUTS], -1)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor_bits", [16, 4])
@torch.no_grad()
def test_one_call_for_all_that_read_an_input(factor_bits: int) -> None:
    model = shared(Attention(factor_bits))
    for rows in (1, 5):
        x = random_input(rows, IN).reshape(1, rows, IN)
        with Launches() as launches:
            check(model, x)
        assert launches.count == 1
    assert all(child.shared._mine.kept is None for child in model.children())


@torch.no_grad()
def test_without_sharing_each_goes_alone() -> None:
    with Launches() as launches:
        check(Attention(), random_input(1, IN))
    assert launches.count == 3


@torch.no_grad()
def test_modules_that_turn_out_to_read_other_inputs() -> None:
    model = shared(Attention())
    first, second = random_input(1, IN), random_input(1, IN, seed=9)
    for _ in range(2):
        torch.testing.assert_close(model.q_proj(first), expected(model.q_proj, first), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.k_proj(second), expected(model.k_proj, second), rtol=1e-4, atol=1e-5)
    check(model, first)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_written_to_in_between(mode: Any) -> None:
    with mode():
        model, x = shared(Attention()), random_input(1, IN)
        model.q_proj(x)
        x *= 2
        torch.testing.assert_close(model.k_proj(x), expected(model.k_proj, x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_a_module_is_made_of_changes_in_between() -> None:
    model, x = shared(Attention()), random_input(1, IN)
    model.q_proj(x)
    model.k_proj.scales.mul_(2)
    model.v_proj.adapter = None
    for name in ("k_proj", "v_proj"):
        made = model.get_submodule(name)
        torch.testing.assert_close(made(x), expected(made, x), rtol=1e-4, atol=1e-5)
    wanted = torch.cat([expected(model.get_submodule(name), x) for name in OUTS], -1)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_adapter_taken_away_or_changed() -> None:
    model, x = shared(Attention()), random_input(1, IN)
    check(model, x)
    adapter, model.k_proj.adapter = model.k_proj.adapter, None
    check(model, x)
    model.k_proj.adapter = adapter
    adapter.lora_B.mul_(3)
    check(model, x)


def test_gradients_take_the_torch_path() -> None:
    model = shared(Attention())
    x = random_input(2, IN).requires_grad_()
    with Launches() as launches:
        model.q_proj(x).sum().backward()
    assert launches.count == 0
    assert x.grad is not None and x.grad.abs().sum() > 0


@torch.no_grad()
def test_copies_and_pickles_compute_alone() -> None:
    model, x = shared(Attention()), random_input(1, IN)
    check(copy.deepcopy(model), x)
    check(pickle.loads(pickle.dumps(model)), x)
    check(model, x)


@torch.no_grad()
def test_compiled_without_a_graph_break() -> None:
    model, x = shared(Attention()), random_input(3, IN)
    wanted = model(x)
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    # To rounding: compiled, each goes alone, and how a product of other sizes sums up is the processor's affair.
    torch.testing.assert_close(found, wanted)


def test_a_checkpoint_that_points_past_its_groups() -> None:
    model = Attention()
    model.k_proj.g_idx = torch.full((IN,), 7, dtype=torch.int32, device=DEVICE)
    with pytest.raises(LayoutError, match=r"layer\.16: g_idx should be 0 to 1"):
        shared(model)


@pytest.mark.parametrize("factor_bits", [16, 4])
@torch.no_grad()
def test_other_kernels_get_their_adapter_in_one_launch(factor_bits: int) -> None:
    made = kernel(TorchLinear, 48, factor_bits=factor_bits)
    for x in (random_input(1, IN), random_input(6, IN).reshape(2, 3, IN)):
        out = random_input(x.numel() // IN, 48, seed=4).reshape(*x.shape[:-1], 48)
        wanted = out + (x @ made.adapter.lora_A) @ made.adapter.lora_B
        with Launches(adding, "_correct") as launches:
            found = made.adapter.apply(x=x, out=out)
        assert found is out and launches.count == 1
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_correction_compiles_without_a_graph_break() -> None:
    adapter = kernel(TorchLinear, 48).adapter
    x = random_input(3, IN)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return adapter.apply(x=x, out=torch.ones(3, 48, device=DEVICE))

    wanted = layer(x)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), wanted)


@torch.no_grad()
def test_what_takes_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    made = kernel(TorchLinear, 48).adapter
    x, out = random_input(1, IN), torch.zeros(1, 48, device=DEVICE)
    wanted = (x @ made.lora_A) @ made.lora_B
    with Launches(adding, "_correct") as launches:
        # Factors that lie otherwise, and an output that does.
        made.lora_A = made.lora_A.contiguous()
        torch.testing.assert_close(made.apply(x=x, out=out.clone()), wanted, rtol=1e-4, atol=1e-5)
        monkeypatch.setenv("GPTQMODEL_EORA_EXT_KERNELS_OFF", "triton-correction")
        off = kernel(TorchLinear, 48).adapter
        torch.testing.assert_close(off.apply(x=x, out=out.clone()), wanted, rtol=1e-4, atol=1e-5)
        monkeypatch.delenv("GPTQMODEL_EORA_EXT_KERNELS_OFF")
        trained = kernel(TorchLinear, 48).adapter
        with torch.enable_grad():
            trained.lora_B.requires_grad_()
            trained.apply(x=x, out=out.clone()).sum().backward()
        assert trained.lora_B.grad is not None and trained.lora_B.grad.abs().sum() > 0
    assert launches.count == 0


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
@torch.no_grad()
def test_a_model_in_cuda_graphs() -> None:
    """Captured by hand, and by torch.compile with its own graphs: replays compute anew."""
    model, x = shared(Attention()), random_input(1, IN)
    model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        x.copy_(random_input(1, IN, seed=seed))
        graph.replay()
        wanted = torch.cat([expected(model.get_submodule(name), x) for name in OUTS], -1)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-5)
