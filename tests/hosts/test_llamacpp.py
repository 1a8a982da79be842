"""Adapters for GGUF models: names, order of rows, what the factors take off the error, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from gptqmodel_eora_ext.adapter.layers import shape_of
from gptqmodel_eora_ext.formats.gguf.lora import SUFFIX_A, SUFFIX_B, read_lora_header
from gptqmodel_eora_ext.formats.gguf.model import GGUFModel, read_tensor
from gptqmodel_eora_ext.hosts.jobs import AdapterJob
from gptqmodel_eora_ext.hosts.llamacpp.weights import GGUFWeights
from gptqmodel_eora_ext.hosts.registry import adapter_maker, base_folder
from gptqmodel_eora_ext.hosts.terminal import quiet
from tests.gguf_files import experts, in_file_order, tensor_of, write_model

WIDTH, LAYERS, VOCABULARY = 64, 2, 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON),
    "gemma3": lambda: Gemma3TextConfig(**COMMON),
    "experts": lambda: Qwen3MoeConfig(
        **COMMON, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    ),
}


def make(kind: str, folder: Path, tokenizer: Any, seed: int = 0) -> Any:
    """A small random model, saved; its linear layers' rows differ in size, as those of trained models do."""
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    model = Gemma3ForCausalLM(config) if kind == "gemma3" else AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(torch.rand(*parameter.shape[:-1], 1) + 0.5)
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    """The linear modules in layers, by full name."""
    modules = model.model.layers.named_modules()
    return {f"model.layers.{name}": one for name, one in modules if isinstance(one, torch.nn.Linear)}


def windows(count: int = 6, length: int = 40) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row.tolist(), "attention_mask": [1] * length} for row in ids]


def generate(base: Path, checkpoint: Path, output: Path | None = None, **adapter: Any) -> Path:
    job = AdapterJob(str(base), checkpoint, windows(), adapter, output=output, batch_size=2)
    with quiet():
        return adapter_maker(checkpoint)(job)


def updates(path: Path) -> dict[str, torch.Tensor]:
    """B A of each tensor, out × in, rows as in the file; of experts the first."""
    lora = read_lora_header(path)
    found = {}
    for tensor in lora.ranks:
        info_A, info_B = (lora.header.tensors[f"{tensor}{suffix}"] for suffix in (SUFFIX_A, SUFFIX_B))
        expert = 0 if len(info_A.shape) == 3 else None
        found[tensor] = read_tensor(info_B, expert=expert) @ read_tensor(info_A, expert=expert)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[Any, Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    model = make("llama", folder / "base", tokenizer)
    return model, folder / "base", write_model(model, folder / "model.gguf", "Q4_0")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3"])
def test_each_architecture_gets_factors_that_fit_its_error(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    """W − Ŵ by the model and the file alone: B A makes it smaller in every module, in the file's own order of rows."""
    model = make(kind, tmp_path / "base", tokenizer)
    file = write_model(model, tmp_path / "model.gguf")
    found = updates(generate(tmp_path / "base", file, rank=16))
    gguf = GGUFModel(file)
    assert set(found) == {tensor_of(name) for name in linears(model)} and len(found) == 7 * LAYERS
    for name, linear in linears(model).items():
        tensor = tensor_of(name)
        delta = torch.from_numpy(in_file_order(name, linear.weight, model.config)) - gguf.read(tensor)
        assert (delta - found[tensor]).norm() < 0.8 * delta.norm(), name


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_factors_are_nearly_as_good(llama: tuple[Any, Path, Path], tmp_path: Path, bits: int) -> None:
    _, base, file = llama
    whole = read_lora_header(generate(base, file, tmp_path / "f16.gguf", rank=32))
    rounded = read_lora_header(generate(base, file, tmp_path / "rounded.gguf", rank=32, factor_bits=bits))
    assert rounded.factor_bits == bits and set(rounded.ranks.values()) == {32}
    kinds = {info.type for info in rounded.header.tensors.values()}
    assert kinds == {"Q8_0" if bits == 8 else "Q4_0"}
    for name, report in whole.details["modules"].items():
        other = rounded.details["modules"][name]
        assert report["error_after"] < other["error_before"]
        assert other["error_after"] - report["error_after"] < 0.1 * report["error_before"], name


def test_experts_in_one_tensor_get_their_factors(tmp_path: Path, tokenizer: Any) -> None:
    model = make("experts", tmp_path / "base", tokenizer)
    file = write_model(model, tmp_path / "model.gguf")
    found = generate(tmp_path / "base", file, rank=32, factor_bits=4)
    tensors = read_lora_header(found).header.tensors
    assert tensors[f"blk.0.ffn_gate_exps.weight{SUFFIX_A}"].shape == (3, 32, WIDTH)
    assert tensors[f"blk.0.ffn_down_exps.weight{SUFFIX_B}"].shape == (3, WIDTH, 32)
    gguf = GGUFModel(file)
    weights = experts(model.model.layers[1].mlp.experts)["down"].detach()
    for expert in range(3):
        delta = weights[expert] - gguf.read("blk.1.ffn_down_exps.weight", expert=expert)
        lora_A, lora_B = (
            read_tensor(tensors[f"blk.1.ffn_down_exps.weight{one}"], expert=expert) for one in (SUFFIX_A, SUFFIX_B)
        )
        assert (delta - lora_B @ lora_A).norm() < 0.8 * delta.norm(), expert


def test_experts_of_a_layer_share_a_rank_under_a_budget(tmp_path: Path, tokenizer: Any) -> None:
    file = write_model(make("experts", tmp_path / "base", tokenizer), tmp_path / "model.gguf")
    lora = read_lora_header(generate(tmp_path / "base", file, budget="2bpw", factor_bits=4, sensitivity="relative"))
    assert any("exps" in name for name in lora.ranks) and any("attn" in name for name in lora.ranks)
    spent = sum(info.nbytes for info in lora.header.tensors.values())
    allocation = lora.details["allocation"]
    assert spent == allocation["spent"] <= allocation["budget"]


def test_a_budget_gives_ranks_of_whole_blocks(llama: tuple[Any, Path, Path], tmp_path: Path) -> None:
    _, base, file = llama
    lora = read_lora_header(
        generate(base, file, tmp_path / "l.gguf", budget="2bpw", factor_bits=4, sensitivity="relative")
    )
    assert lora.ranks and all(rank % 32 == 0 for rank in lora.ranks.values())
    spent = sum(info.nbytes for info in lora.header.tensors.values())
    allocation = lora.details["allocation"]
    assert spent == allocation["spent"] <= allocation["budget"]


def test_modules_in_16_bits_are_left_out(llama: tuple[Any, Path, Path], tmp_path: Path) -> None:
    model, base, _ = llama
    file = write_model(model, tmp_path / "m.gguf", skipped=".down_proj")
    lora = read_lora_header(generate(base, file, rank=4))
    assert set(lora.ranks) == {tensor_of(name) for name in linears(model) if not name.endswith(".down_proj")}
    assert (tmp_path / "m.eora.gguf").is_file()


def test_what_cannot_be_is_refused_before_a_layer_runs(
    llama: tuple[Any, Path, Path], tmp_path: Path, tokenizer: Any
) -> None:
    _, base, file = llama
    with pytest.raises(ValueError, match=r"multiple of 32, got 48\. Take 32 or 64"):
        generate(base, file, rank=48, factor_bits=4)
    with pytest.raises(ValueError, match="is a folder"):
        generate(base, file, tmp_path, rank=4)
    with pytest.raises(ValueError, match=r"was not quantised from .*self_attn.q_proj.*cosine"):
        generate(base, write_model(make("llama", tmp_path / "o", tokenizer, seed=1), tmp_path / "other.gguf"), rank=4)
    with pytest.raises(ValueError, match=r"was not quantised from .*the file has no"):
        make("experts", tmp_path / "experts", tokenizer)
        generate(tmp_path / "experts", file, rank=4)
    with pytest.raises(ValueError, match="expected a model"):
        generate(base, generate(base, file, tmp_path / "lora.gguf", rank=4), rank=4)


def test_a_layer_of_another_model_is_named_when_it_is_met(llama: tuple[Any, Path, Path]) -> None:
    """Rows of the first and the last layer are compared before the run, all others when they are read."""
    model, _, file = llama
    weights = GGUFWeights(GGUFModel(file), "base")
    found = linears(model)
    known = weights.known([shape_of(name, one) for name, one in found.items()], lambda name: found[name].weight.data)
    name = "model.layers.0.mlp.up_proj"
    assert known[name](found[name].weight.data).shape == found[name].weight.shape
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj.*cosine"):
        known[name](torch.randn_like(found[name].weight))


def test_a_base_that_is_quantised_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    file = write_model(make("llama", tmp_path / "base", tokenizer), tmp_path / "q4.gguf")
    with pytest.raises(ValueError, match=r"q4.gguf` is quantised \(blk\.0\..* is of type Q4_0\).*Name its F16"):
        base_folder(str(file))
    plain = write_model(make("llama", tmp_path / "base", tokenizer), tmp_path / "part.gguf", "F16",
                        metadata={"split.count": 1})  # fmt: skip
    with pytest.raises(ValueError, match=r"transformers does not read .*Name the model's Hugging Face folder"):
        base_folder(str(plain))
    assert base_folder("someone/model") == "someone/model"
