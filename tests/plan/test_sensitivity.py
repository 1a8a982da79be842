"""Sensitivities against gradients taken one by one, and against the loss itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.plan.forecast import forecast
from gptqmodel_eora_ext.plan.sensitivity import ACTIVATION_BYTES, Sensitivity, measure_sensitivity
from gptqmodel_eora_ext.solve import eora, error_loss

from .helpers import VOCABULARY, tiny_model

TOKENS = 24


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def linears(model: Any) -> dict[str, torch.nn.Linear]:
    return {name: one for name, one in model.model.named_modules() if isinstance(one, torch.nn.Linear)}


def windows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (count, 1, TOKENS), generator=generator)
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


@pytest.mark.parametrize("activation_bytes", [0, ACTIVATION_BYTES], ids=["checkpointed", "kept"])
def test_empirical_moments_are_those_of_autograd(
    model: Any, linears: dict[str, torch.nn.Linear], activation_bytes: int
) -> None:
    batches = windows(2)
    found = measure_sensitivity(model, linears, batches, kind="empirical", activation_bytes=activation_bytes)
    name = "layers.1.mlp.up_proj"
    caught: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []

    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        caught.append(output)
        inputs.append(args[0].detach())

    handle = linears[name].register_forward_hook(hook)
    for batch in batches:
        loss = model(**batch, labels=batch["input_ids"]).loss * (TOKENS - 1)
        loss.backward()
    handle.remove()
    model.zero_grad()
    gradients = torch.cat([output.grad[0] for output in caught if output.grad is not None])
    rows = torch.cat([one[0] for one in inputs])
    torch.testing.assert_close(found.output_moments[name], gradients.T @ gradients / (2 * TOKENS), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.second_moments[name], rows.T @ rows / (2 * TOKENS), rtol=1e-4, atol=1e-6)
    squares = gradients.square().sum(1, keepdim=True)
    expected = (rows * squares).T @ rows / squares.sum()
    torch.testing.assert_close(found.weighted_moments[name], expected, rtol=1e-4, atol=1e-6)
    assert set(found.weighted_moments) == set(linears)
    assert found.tokens == 2 * TOKENS
    assert found.second_moments["layers.0.self_attn.q_proj"] is found.second_moments["layers.0.self_attn.v_proj"]
    assert found.second_moments["layers.0.mlp.up_proj"] is not found.second_moments["layers.0.self_attn.v_proj"]


def test_gradients_of_the_first_tokens(model: Any, linears: dict[str, torch.nn.Linear]) -> None:
    batches = windows(3)
    some = measure_sensitivity(model, linears, batches, kind="empirical", gradient_tokens=TOKENS + 1)
    first, whole = (measure_sensitivity(model, linears, data, kind="empirical") for data in (batches[:2], batches))
    for name in linears:
        torch.testing.assert_close(some.second_moments[name], whole.second_moments[name])
        torch.testing.assert_close(some.output_moments[name], first.output_moments[name])
        torch.testing.assert_close(some.weighted_moments[name], first.weighted_moments[name])
    assert some.tokens == 3 * TOKENS
    assert len({some.fingerprint, first.fingerprint, whole.fingerprint}) == 3


def test_fisher_predicts_the_divergence(model: Any, linears: dict[str, torch.nn.Linear]) -> None:
    """½ tr(G ΔW C_g ΔWᵀ) against the measured divergence from the full-precision model, for a small random error."""
    batches = windows(48)
    found = measure_sensitivity(model, linears, batches)
    name = "layers.0.mlp.down_proj"
    weight = linears[name].weight.detach()
    delta = 0.005 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.norm(dim=1)[:, None]
    predicted, independent = (
        error_loss(delta, moments[name], found.output_moments[name])
        for moments in (found.weighted_moments, found.second_moments)
    )
    divergence = 0.0
    original = weight.clone()
    with torch.no_grad():
        for batch in batches:
            weight.copy_(original)
            before = model(**batch).logits.log_softmax(-1)
            weight.copy_(original + delta)
            after = model(**batch).logits.log_softmax(-1)
            divergence += float((before.exp() * (before - after)).sum(-1)[:, :-1].sum())
    weight.copy_(original)
    measured = divergence / (len(batches) * TOKENS)
    # One draw of labels a token: the estimate itself is good to about a tenth.
    assert predicted == pytest.approx(measured, rel=0.15)
    # Gradients and inputs taken to be independent predict too much here.
    assert independent > 1.2 * measured


def test_tokens_with_inputs_of_their_own_are_corrected_for() -> None:
    """One token in ten has large gradients, and errors hardly reach its inputs; the bare second order overestimates."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 24, generator=generator)
    gradients = torch.randn(4000, 16, generator=generator)
    rows[::10], gradients[::10] = rows[::10] * torch.logspace(0, -2, 24), gradients[::10] * 10
    delta = torch.randn(16, 24, generator=generator)
    squares = gradients.square().sum(1, keepdim=True)
    known = [rows.T @ rows / 4000, (rows * squares).T @ rows / squares.sum()]
    sensitivity = Sensitivity(
        {"m": gradients.T @ gradients / 4000}, {"m": known[0]}, {"m": known[1]}, 4000, "fisher", ""
    )
    for rank in (0, 4, 12, 16):
        found = forecast("m", delta, sensitivity, rank)
        lora_A, lora_B = eora(delta, known[0], max(rank, 1))
        left = delta - (lora_B[:, :rank] @ lora_A[:rank]).float()
        expected = float(((rows @ left.T) * gradients).sum(1).square().mean()) / 2
        assert found.total - float(found.gains.sum()) == pytest.approx(expected, rel=0.15, abs=1e-3)
    assert found.correction.tail < 0.7


def test_padding_is_left_out(model: Any, linears: dict[str, torch.nn.Linear]) -> None:
    [plain] = windows(1)
    padded = {
        "input_ids": torch.nn.functional.pad(plain["input_ids"], (0, 6)),
        "attention_mask": torch.nn.functional.pad(plain["attention_mask"], (0, 6)),
    }
    first, second = (measure_sensitivity(model, linears, [one], kind="empirical") for one in (plain, padded))
    assert second.tokens == TOKENS
    for name, moment in first.output_moments.items():
        torch.testing.assert_close(second.output_moments[name], moment, rtol=1e-3, atol=1e-6)
        weighted = (one.weighted_moments[name] for one in (second, first))
        torch.testing.assert_close(*weighted, rtol=1e-3, atol=1e-6)


def test_relative_weighs_by_the_output(model: Any, linears: dict[str, torch.nn.Linear]) -> None:
    found = measure_sensitivity(model, linears, windows(2), kind="relative")
    name = "layers.1.self_attn.o_proj"
    weight, moment = linears[name].weight.data, found.second_moments[name]
    signal = float((weight @ moment * weight).sum())
    torch.testing.assert_close(found.output_moments[name], torch.full((16,), 1 / signal), rtol=1e-4, atol=0)


def test_diagonals_where_full_moments_do_not_fit(model: Any, linears: dict[str, torch.nn.Linear]) -> None:
    full = measure_sensitivity(model, linears, windows(2), kind="empirical")
    diagonal = measure_sensitivity(model, linears, windows(2), kind="empirical", full_bytes=100)
    for name in linears:
        torch.testing.assert_close(diagonal.output_moments[name], full.output_moments[name].diagonal())
        torch.testing.assert_close(diagonal.second_moments[name], full.second_moments[name].diagonal())
        torch.testing.assert_close(diagonal.weighted_moments[name], full.weighted_moments[name].diagonal())


def test_saved_and_read(model: Any, linears: dict[str, torch.nn.Linear], tmp_path: Path) -> None:
    found = measure_sensitivity(model, linears, windows(1))
    found.save(tmp_path / "cache" / "one.safetensors")
    read = Sensitivity.load(tmp_path / "cache" / "one.safetensors")
    assert (read.tokens, read.kind, read.fingerprint) == (found.tokens, found.kind, found.fingerprint)
    for name in linears:
        assert torch.equal(read.output_moments[name], found.output_moments[name])
        assert torch.equal(read.weighted_moments[name], found.weighted_moments[name])
        assert torch.equal(read.second_moments[name], found.second_moments[name])
    assert read.second_moments["layers.0.self_attn.q_proj"] is read.second_moments["layers.0.self_attn.k_proj"]


def test_a_seed_gives_the_same_again_and_weights_get_no_gradient(
    model: Any, linears: dict[str, torch.nn.Linear]
) -> None:
    first, second = (measure_sensitivity(model, linears, windows(1)) for _ in range(2))
    other = measure_sensitivity(model, linears, windows(1), seed=1)
    name = "layers.1.mlp.gate_proj"
    assert torch.equal(first.output_moments[name], second.output_moments[name])
    assert not torch.equal(first.output_moments[name], other.output_moments[name])
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert all(one.grad is None and one.requires_grad for one in model.parameters())


def test_layers_keep_no_activations_where_they_are_too_many(model: Any, linears: dict[str, torch.nn.Linear]) -> None:
    def saved(modules: dict[str, torch.nn.Linear]) -> int:
        """Values that the forward keeps for the backward, those that a layer is to compute again left out."""
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            measure_sensitivity(model, modules, windows(1), kind="empirical", activation_bytes=0)
        return sum(sizes)

    # No layer holds the head, so with it alone none is run again.
    assert saved(linears) < saved({"lm_head": model.lm_head})
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_unknown_kind(model: Any, linears: dict[str, torch.nn.Linear]) -> None:
    with pytest.raises(ValueError, match="kind must be one of"):
        measure_sensitivity(model, linears, windows(1), kind="exact")
