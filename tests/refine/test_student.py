"""The trained view of a model: outputs and gradients are those of dense weights Ŵ + B A."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.kernels.cpu import build
from gptqmodel_eora_ext.kernels.cpu.repack import repack_weight
from gptqmodel_eora_ext.kernels.fused import FusedLinear
from gptqmodel_eora_ext.kernels.reference import dequantize
from gptqmodel_eora_ext.refine import Trainee
from gptqmodel_eora_ext.refine import losses as losses_module
from gptqmodel_eora_ext.refine.factors import TrainedFactors
from gptqmodel_eora_ext.refine.linear import TrainedLinear
from gptqmodel_eora_ext.refine.losses import LOSSES, window_loss
from gptqmodel_eora_ext.refine.student import Student
from tests.kernels.cases import packed_weight

from .conftest import VOCABULARY, DenseWeight, linears, small_model, starting_factors


def factors_of(trainee: Trainee) -> TrainedFactors:
    start = {name: (one.lora_A.float(), one.lora_B.T.float()) for name, one in starting_factors(16).items()}
    # One module has none, as under a budget.
    start.pop("model.layers.0.mlp.up_proj")
    factors = TrainedFactors(start, bits=16, stored_as=torch.float16, dtype=torch.float32)
    factors.use_rounded()
    return factors


def dense_twin(trainee: Trainee, factors: TrainedFactors) -> tuple[Any, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A plain model that computes Ŵ + B A, and its leaves."""
    model = small_model()
    leaves = {}
    for name, one in linears(model).items():
        frozen = trainee.weights[name].dense(torch.float32).T
        found = factors.parameters(name)
        if found is None:
            one.weight.data = frozen.contiguous()
            continue
        widths = (one.in_features, one.out_features)
        halves = [half.detach()[:, :width].clone() for half, width in zip(found, widths, strict=True)]
        down, up = (half.requires_grad_() for half in halves)
        leaves[name] = (down, up)
        del one.weight
        one.weight = frozen + up.T @ down
    return model, leaves


def test_outputs_and_gradients_are_those_of_dense_weights(trainee: Trainee, ids: torch.Tensor) -> None:
    factors = factors_of(trainee)
    plain, leaves = dense_twin(trainee, factors)
    student = Student(trainee, factors, torch.float32)
    hidden = student.hidden(ids[0])
    with student.head() as head, torch.no_grad():
        scores = head(hidden.detach())[1]
    expected = plain(ids[:1]).logits[0]
    assert torch.allclose(scores, expected, atol=1e-4)
    wanted = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    hidden.backward(wanted)
    (plain.model.layers[-1](*_last_input(plain, ids[:1]))[0] * wanted).sum().backward()
    for name, pair in leaves.items():
        found = factors.parameters(name)
        assert found is not None
        for mine, theirs in zip(found, pair, strict=True):
            assert mine.grad is not None and theirs.grad is not None
            gradient = mine.grad[:, : theirs.shape[1]]
            assert torch.allclose(gradient, theirs.grad, rtol=1e-3, atol=1e-4 * float(theirs.grad.abs().max())), name


def _last_input(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the last layer is given, with the graph behind it."""
    seen: list[Any] = []
    layer = model.model.layers[-1]
    handle = layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    model(ids)
    handle.remove()
    args, kwargs = seen[0]
    original = layer.forward
    layer.forward = lambda *inner: original(*inner, **kwargs)
    return args


def test_the_model_is_put_back(trainee: Trainee, ids: torch.Tensor) -> None:
    before = trainee.model(ids[:1]).logits
    student = Student(trainee, factors_of(trainee), torch.bfloat16)
    assert any(isinstance(one, TrainedLinear) for one in trainee.model.modules())
    student.close()
    assert torch.equal(trainee.model(ids[:1]).logits, before)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_in_chunks_is_the_plain_loss(
    loss: str, trainee: Trainee, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses_module, "CHUNK_BYTES", 4 * VOCABULARY * 7)  # seven tokens, the last chunk shorter
    student = Student(trainee, factors_of(trainee), torch.float32)
    generator = torch.Generator().manual_seed(4)
    hidden, teacher = (torch.randn(24, 64, generator=generator) for _ in range(2))
    with student.head() as head:
        value, gradient = window_loss(loss, head, hidden, teacher, ids[0], VOCABULARY)
        rows = hidden.clone().requires_grad_()
        plain = PLAIN[loss](head(rows), head(teacher), ids[0])
        plain.backward()
        alone, nothing = window_loss(loss, head, hidden, teacher, ids[0], VOCABULARY, with_gradient=False)
    assert value == pytest.approx(plain.item(), rel=1e-5) and alone == pytest.approx(value) and nothing is None
    assert gradient is not None and torch.allclose(gradient, rows.grad, atol=1e-6)


Pair = tuple[torch.Tensor, torch.Tensor]


def plain_divergence(found: Pair, wanted: Pair, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.kl_div(
        found[1].log_softmax(-1), wanted[1].detach().log_softmax(-1), reduction="batchmean", log_target=True
    )


def plain_rilq(found: Pair, wanted: Pair, ids: torch.Tensor) -> torch.Tensor:
    text = torch.nn.functional.cross_entropy(found[1][:-1], ids[1:])
    return 0.5 * torch.nn.functional.mse_loss(found[0], wanted[0].detach()) + 0.5 * text


PLAIN: dict[str, Callable[[Pair, Pair, torch.Tensor], torch.Tensor]] = {"kl": plain_divergence, "rilq": plain_rilq}


def test_a_layer_on_three_dimensions_with_a_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, 10, generator=generator), torch.randn(6, generator=generator)
    down, up = (torch.randn(2, width, generator=generator, requires_grad=True) for width in (10, 6))
    x = torch.randn(2, 3, 10, generator=generator, requires_grad=True)
    y = TrainedLinear(DenseWeight(weight, bias), (down, up))(x)
    expected = x @ (weight + up.T @ down).T + bias
    assert torch.allclose(y, expected, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), (x, down, up))
    for mine, theirs in zip(torch.autograd.grad(y.square().sum(), (x, down, up)), wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(build.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_cpu_kernel_gives_the_dense_weight(bits: int) -> None:
    weight = packed_weight(bits=bits, group_size=32, in_features=96, out_features=1048)
    found = FusedLinear(repack_weight(weight)).dense(torch.bfloat16)
    assert torch.equal(found, dequantize(weight).T.to(torch.bfloat16))
