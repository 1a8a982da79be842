"""Refinement over GGUF files: what is validated is what the two files say, whatever the order of rows and the type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptqmodel_eora_ext.adapter.errors import AdapterError
from gptqmodel_eora_ext.adapter.summary import summarize
from gptqmodel_eora_ext.formats.gguf import GGUFError
from gptqmodel_eora_ext.formats.gguf.lora import LoraPair, read_lora, read_lora_header, write_lora
from gptqmodel_eora_ext.formats.gguf.model import GGUFModel
from gptqmodel_eora_ext.hosts.refine import refine_checkpoint
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.refine.shared import dealt
from gptqmodel_eora_ext.solve.quantized import quantize_factor
from tests.gguf_files import interleaved, tensor_of, write_model
from tests.hosts.test_llamacpp import VOCABULARY, generate, linears, make, updates
from tests.refine.conftest import rounded

WINDOW, WINDOWS, RANK = 32, 40, 32


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every processor compute the same."""
    for place in ("refine.run", "hosts.llamacpp.trainable"):
        monkeypatch.setattr(f"gptqmodel_eora_ext.{place}.activation_dtype", lambda device: torch.float32)


def windows() -> list[dict[str, list[int]]]:
    ids = torch.randint(3, VOCABULARY, (WINDOWS, WINDOW), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row.tolist()} for row in ids]


def written(kind: str, folder: Path, tokenizer: Any) -> tuple[Path, Path]:
    """A model's folder, and a file of it whose weights are rounded far more than Q4_0 does.

    All are larger than those that training begins with, so that their rounding matters for the scores.
    """
    base = folder / "base"
    model = make(kind, base, tokenizer)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
        for one in linears(model).values():
            one.weight.mul_(4)
        model.save_pretrained(base)
        for one in linears(model).values():
            one.weight.copy_(rounded(one.weight))
    return base, write_model(model, folder / "model.gguf")


def refine(
    base: Path, file: Path, adapter: Path, output: Path | None = None, rate: float | None = 1e-4, **more: Any
) -> Any:
    with quiet():
        return refine_checkpoint(file, str(base), windows(), adapter=adapter, output=output, window=WINDOW,
                                 tokens=WINDOWS * WINDOW, learning_rate=rate, **more)  # fmt: skip


def in_model_order(name: str, rows: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows of the file's order (Llama's q and k are interleaved there) back in the model's."""
    if config.model_type != "llama" or not name.endswith((".q_proj", ".k_proj")):
        return rows
    heads = config.num_attention_heads if name.endswith(".q_proj") else config.num_key_value_heads
    places = torch.from_numpy(interleaved(torch.arange(len(rows)).float()[:, None].numpy(), heads))[:, 0].long()
    result = torch.empty_like(rows)
    result[places] = rows
    return result


def divergence(base: Path, file: Path, adapter: Path) -> float:
    """Nats a token on the windows that validate, by the two files and transformers alone."""
    model, full = (AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32) for _ in range(2))
    gguf, added = GGUFModel(file), updates(adapter)
    for name, linear in linears(model).items():
        tensor = tensor_of(name)
        linear.weight.data = in_model_order(name, gguf.read(tensor) + added.get(tensor, 0), model.config)
    ids = torch.tensor([one["input_ids"] for one in windows()])[dealt(WINDOWS, 0).validating]
    with torch.no_grad():
        wanted, found = (one(ids).logits.log_softmax(-1) for one in (full, model))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize(("kind", "bits"), [("llama", 4), ("llama", 16), ("qwen2", 4), ("qwen3", 8), ("gemma3", 4)])
def test_what_validates_is_what_the_files_hold(kind: str, bits: int, tmp_path: Path, tokenizer: Any) -> None:
    base, file = written(kind, tmp_path, tokenizer)
    # The best correction of each weight by itself: EoRA's leaves so few windows nothing to learn in a random model.
    start = generate(base, file, tmp_path / "eora.gguf", rank=RANK, factor_bits=bits, objective="svd")
    before = start.read_bytes()
    outcome = refine(base, file, start)
    refined = tmp_path / "eora-refined.gguf"
    assert outcome.after < outcome.before
    for adapter, validated in ((start, outcome.before), (refined, outcome.after)):
        assert divergence(base, file, adapter) == pytest.approx(validated, rel=1e-3)
    one, other = summarize(start), summarize(refined)
    assert one.ranks == other.ranks and one.factor_bits == other.factor_bits == bits
    assert abs(one.bytes - other.bytes) < 20_000  # reports of modules apart
    assert other.details["refinement"]["after"] == outcome.after and not other.modules
    assert start.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_a_natural_gradient_step_is_rounded_as_the_file_holds_it(tmp_path: Path, tokenizer: Any) -> None:
    base, file = written("llama", tmp_path, tokenizer)
    start = generate(base, file, tmp_path / "eora.gguf", rank=RANK, factor_bits=4, objective="svd")
    outcome = refine(base, file, start, rate=None, loss="natural")
    assert outcome.after < outcome.before
    assert divergence(base, file, tmp_path / "eora-refined.gguf") == pytest.approx(outcome.after, rel=1e-3)


def test_an_adapter_that_is_not_better_stays_as_it_was(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, file = written("llama", tmp_path, tokenizer)
    start = generate(base, file, tmp_path / "eora.gguf", rank=RANK, factor_bits=4)
    monkeypatch.setattr("gptqmodel_eora_ext.refine.training.rate_of", lambda rate, step, steps: 10.0)
    outcome = refine(base, file, start)
    assert outcome.after == outcome.before
    for one, other in zip(updates(start).values(), updates(tmp_path / "eora-refined.gguf").values(), strict=True):
        assert torch.equal(one, other)


def test_an_adapters_own_scale_is_in_what_is_read(tmp_path: Path) -> None:
    """Other tools write alpha; llama.cpp multiplies by alpha / rank."""
    import gguf

    path = tmp_path / "lora.gguf"
    lora_A, lora_B = torch.randn(4, 32), torch.randn(8, 4)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 8.0)
    for name, values in (("lora_a", lora_A), ("lora_b", lora_B)):
        writer.add_tensor(f"blk.0.attn_q.weight.{name}", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found_A, found_B = read_lora(read_lora_header(path))["blk.0.attn_q.weight"]
    assert torch.equal(found_A, lora_A) and torch.equal(found_B, 2 * lora_B)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, tokenizer: Any) -> None:
    base, file = written("llama", tmp_path, tokenizer)
    lora = generate(base, file, tmp_path / "eora.gguf", rank=RANK, factor_bits=4)

    def adapter(name: str, tensor: str, lora_A: torch.Tensor, lora_B: torch.Tensor, **more: LoraPair) -> Path:
        write_lora(tmp_path / name, "llama", {tensor: LoraPair(lora_A, lora_B), **more}, name="n", details={})
        return tmp_path / name

    four_bits = [quantize_factor(torch.ones(*shape), 4, group_size=32) for shape in ((32, 64), (64, 32))]
    mixed = {"blk.0.attn_output.weight": LoraPair(*four_bits)}

    for wrong, message in (
        (adapter("a.gguf", "blk.9.attn_q.weight", torch.ones(2, 64), torch.ones(64, 2)), "no quantised matrix"),
        (adapter("b.gguf", "blk.0.attn_q.weight", torch.ones(2, 32), torch.ones(64, 2)), "out × in = 64 × 32"),
        (adapter("c.gguf", "blk.0.attn_q.weight", torch.ones(2, 64), torch.ones(64, 2), **mixed), "in one width"),
        (file, "expected an adapter"),
    ):
        with pytest.raises(GGUFError, match=message):
            refine(base, file, wrong, tmp_path / "out.gguf")
    with pytest.raises(AdapterError, match="names no adapter by itself"):
        refine(base, file, None)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="is none"):
        refine(base, file, tmp_path / "missing.gguf")
    for output, message in ((lora, "stays as it is"), (tmp_path, "is a folder")):
        with pytest.raises(ValueError, match=message):
            refine(base, file, lora, output)


def test_experts_in_one_tensor_are_refused_by_name(tmp_path: Path, tokenizer: Any) -> None:
    base = tmp_path / "base"
    file = write_model(make("experts", base, tokenizer), tmp_path / "model.gguf")
    lora = generate(base, file, tmp_path / "eora.gguf", rank=RANK, factor_bits=4)
    with pytest.raises((NotImplementedError, GGUFError), match="exps"):
        refine(base, file, lora, tmp_path / "out.gguf")
