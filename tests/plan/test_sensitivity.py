"""Gradients layer by layer against those of the whole model by autograd, and against the loss itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.plan.forecast import ModuleMoments, forecast
from gptqmodel_eora_ext.plan.gradients import measure_gradients
from gptqmodel_eora_ext.plan.layered import LayeredModel
from gptqmodel_eora_ext.plan.rows import moment_of
from gptqmodel_eora_ext.plan.sensitivity import Sensitivity, SensitivityWriter, fingerprint
from gptqmodel_eora_ext.plan.survey import cached_sensitivity, memory_limit
from gptqmodel_eora_ext.solve import RowMoment, eora, error_loss
from gptqmodel_eora_ext.system.spill import Spill

from .helpers import CONFIGS, TOKENS, architecture, in_files, in_memory, linears, mixed_batches, tiny_model, windows

MEMORY = 1 << 30


def gradients(
    model: LayeredModel, batches: list[dict[str, Any]], limit: int = MEMORY, **options: Any
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    spill = Spill(limit, Path("/nonexistent") if limit else Path.cwd())
    measure_gradients(
        model, list(linears(model.model)), batches, lambda index, some: found.update(some), spill=spill, **options
    )
    spill.close()
    return found


def by_autograd(whole: Any, batches: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of the text's cross entropy at outputs, and inputs, of the tokens that count."""
    pulled: dict[str, list[torch.Tensor]] = {}
    read: dict[str, list[torch.Tensor]] = {}
    caught: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name: str) -> Any:
        def note(module: Any, given: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            caught[name] = given[0].detach(), output

        return note

    handles = [one.register_forward_hook(hook(name)) for name, one in linears(whole).items()]
    for batch in batches:
        keep = batch["attention_mask"].bool()
        scores = whole(**batch).logits[:, :-1][keep[:, 1:]]
        torch.nn.functional.cross_entropy(scores, batch["input_ids"][:, 1:][keep[:, 1:]], reduction="sum").backward()
        for name, (rows, output) in caught.items():
            assert output.grad is not None
            pulled.setdefault(name, []).append(output.grad[keep])
            read.setdefault(name, []).append(rows[keep])
    for handle in handles:
        handle.remove()
    whole.zero_grad()
    joined = [{name: torch.cat(rows) for name, rows in found.items()} for found in (pulled, read)]
    return joined[0], joined[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    """Of windows of two lengths, padding left out, with weights in memory or read layer by layer."""
    whole = architecture(name)
    expected, _ = by_autograd(whole, mixed_batches())
    for model in (in_memory(whole), in_files(whole, tmp_path)):
        found = gradients(model, mixed_batches(), kind="empirical")
        assert set(found) == set(expected)
        for module, rows in expected.items():
            torch.testing.assert_close(found[module], rows, rtol=1e-3, atol=1e-5 * float(rows.abs().max()))
    assert all(one.grad is None and one.requires_grad for one in whole.parameters())


def test_on_disk_the_bits_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = in_memory(architecture("qwen3"))
    first, second = (gradients(model, mixed_batches(), limit) for limit in (MEMORY, 0))
    for name, rows in first.items():
        assert torch.equal(second[name], rows)
    assert not list(tmp_path.iterdir())


def test_fisher_predicts_the_divergence() -> None:
    """½ tr(G ΔW C_g ΔWᵀ) against the measured divergence from the full-precision model, for a small random error."""
    whole = tiny_model()
    batches = windows(48)
    name = "model.layers.0.mlp.down_proj"
    pulled = gradients(in_memory(whole), batches)[name]
    _, read = by_autograd(whole, batches)
    squares = pulled.square().sum(1, keepdim=True)
    output_moment = moment_of(pulled, name)
    weighted, plain = (
        moment_of(read[name] * squares.sqrt(), name, float(squares.sum())),
        moment_of(read[name], name),
    )
    weight = linears(whole)[name].weight.detach()
    delta = 0.005 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.norm(dim=1)[:, None]
    predicted, independent = (error_loss(delta, moment, output_moment) for moment in (weighted, plain))
    divergence = 0.0
    original = weight.clone()
    with torch.no_grad():
        for batch in batches:
            weight.copy_(original)
            before = whole(**batch).logits.log_softmax(-1)
            weight.copy_(original + delta)
            after = whole(**batch).logits.log_softmax(-1)
            divergence += float((before.exp() * (before - after)).sum(-1)[:, :-1].sum())
    measured = divergence / (len(batches) * TOKENS)
    # One draw of labels a token: the estimate itself is good to about a tenth.
    assert predicted == pytest.approx(measured, rel=0.15)
    # Gradients and inputs taken to be independent predict too much here.
    assert independent > 1.2 * measured


def test_tokens_with_inputs_of_their_own_are_corrected_for() -> None:
    """One token in ten has large gradients, and errors hardly reach its inputs; the bare second order overestimates."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 24, generator=generator)
    pulled = torch.randn(4000, 16, generator=generator)
    rows[::10], pulled[::10] = rows[::10] * torch.logspace(0, -2, 24), pulled[::10] * 10
    delta = torch.randn(16, 24, generator=generator)
    squares = pulled.square().sum(1, keepdim=True)
    known = ModuleMoments(
        moment_of(rows, "m"), moment_of(pulled, "m"), moment_of(rows * squares.sqrt(), "m", float(squares.sum()))
    )
    for rank in (0, 4, 12, 16):
        found = forecast(delta, known, rank)
        lora_A, lora_B = eora(delta, known.inputs, max(rank, 1))
        left = delta - (lora_B[:, :rank] @ lora_A[:rank]).float()
        expected = float(((rows @ left.T) * pulled).sum(1).square().mean()) / 2
        assert found.total - float(found.gains.sum()) == pytest.approx(expected, rel=0.15, abs=1e-3)
    assert found.correction.tail < 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_in_the_smaller_form_and_read_back(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    wide, narrow = (torch.randn(40, features, generator=generator).to(dtype) for features in (64, 8))
    writer = SensitivityWriter(tmp_path, 40)
    writer.add(0, {"a": wide})
    writer.add(1, {"b": narrow})
    writer.finish("fisher", "print")
    found = Sensitivity.load(tmp_path)
    assert (found.tokens, found.kind, found.fingerprint, set(found)) == (40, "fisher", "print", {"a", "b"})
    assert isinstance(found["a"], RowMoment) and torch.equal(found["a"].rows, wide.float())
    dense = found["b"]
    assert isinstance(dense, torch.Tensor)
    torch.testing.assert_close(dense, narrow.float().T @ narrow.float() / 40)
    torch.testing.assert_close(found.squares("a"), wide.float().square().sum(1))
    (tmp_path / "sensitivity.json").write_text('{"format": "eora-sensitivity-2"}')
    with pytest.raises(ValueError, match="eora-sensitivity-2"):
        Sensitivity.load(tmp_path)


def test_infinite_gradients_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="q_proj"):
        SensitivityWriter(tmp_path, 1).add(0, {"q_proj": torch.tensor([[1.0, float("inf")]])})


def test_cached_once_and_an_interrupted_run_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("EORA_SURVEY_MEMORY", "1b")
    model, names = in_memory(tiny_model()), list(linears(tiny_model()))
    steps: list[int] = []

    def interrupted(steps: Any) -> Any:
        yield steps[0]
        raise KeyboardInterrupt

    # Two layers: a step for each on the way forward, and one on the way back.
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            cached_sensitivity(model, names, windows(2), kind="fisher", bar=lambda title: interrupted)
    root = tmp_path / "gptqmodel-eora-ext" / "sensitivity"
    assert [one.name[-11:] for one in root.iterdir()] == [".unfinished"]

    def counted(items: Any) -> Any:
        for item in items:
            steps.append(item)
            yield item

    first, second = (
        cached_sensitivity(model, names, windows(2), kind="fisher", bar=lambda title: counted) for _ in range(2)
    )
    assert steps == [3] and first.fingerprint == second.fingerprint
    [folder] = root.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == [
        "layer-0.safetensors", "layer-1.safetensors", "sensitivity.json"
    ]  # fmt: skip
    assert first.tokens == 2 * TOKENS and set(first) == set(names)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "never-interrupted"))
    never = cached_sensitivity(model, names, windows(2), kind="fisher")
    for file in set(first.files.values()):
        assert (first.folder / file).read_bytes() == (never.folder / file).read_bytes()


def test_a_seed_gives_the_same_again_and_fingerprints_tell_apart(tmp_path: Path) -> None:
    model, names = in_memory(tiny_model()), list(linears(tiny_model()))
    first, second, other = (gradients(model, windows(1), seed=seed) for seed in (0, 0, 1))
    name = "model.layers.1.mlp.gate_proj"
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], other[name])
    prints = [
        fingerprint(model, names, windows(1), "fisher"), fingerprint(model, names, windows(1), "fisher", 1),
        fingerprint(model, names, windows(1), "empirical"), fingerprint(model, names, windows(2), "fisher"),
        fingerprint(model, names[1:], windows(1), "fisher"),
    ]  # fmt: skip
    changed = tiny_model()
    changed.model.layers[1].mlp.up_proj.weight.data[-1, 0] += 1
    prints.append(fingerprint(in_memory(changed), names, windows(1), "fisher"))
    assert len(set(prints)) == len(prints)
    files = [fingerprint(in_files(one, tmp_path / str(at)), names, windows(1), "fisher")
             for at, one in enumerate((tiny_model(), changed, tiny_model()))]  # fmt: skip
    assert files[0] == files[2] != files[1]


def test_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in ((None, 1 << 30), ("300MB", 300_000_000), ("4096", 4096)):
        if value is None:
            monkeypatch.delenv("EORA_SURVEY_MEMORY", raising=False)
        else:
            monkeypatch.setenv("EORA_SURVEY_MEMORY", value)
        assert memory_limit() == expected
    for value in ("much", "0.5bpw", "0"):
        monkeypatch.setenv("EORA_SURVEY_MEMORY", value)
        with pytest.raises(ValueError, match="EORA_SURVEY_MEMORY"):
            memory_limit()
