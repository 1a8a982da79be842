"""What is made for llama.cpp, in llama.cpp's own programs (`make llamacpp`, `make test-llamacpp`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
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

from gptqmodel_eora_ext.formats.gguf.model import GGUFModel
from gptqmodel_eora_ext.hosts.jobs import AdapterJob, ExportJob, ImatrixJob, TypePlanJob
from gptqmodel_eora_ext.hosts.refine import refine_checkpoint
from gptqmodel_eora_ext.hosts.registry import adapter_maker, base_folder, exporter, imatrix_maker, type_planner
from gptqmodel_eora_ext.hosts.terminal import quiet
from tests.gguf_files import tensor_of
from tests.hosts.test_gguf_export import checkpoint, packed
from tests.hosts.test_llamacpp import linears

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import llamacpp_logits  # type: ignore[import-not-found]
import llamacpp_tools as llama  # type: ignore[import-not-found]

pytestmark = [pytest.mark.llamacpp, pytest.mark.skipif(not llama.is_built(), reason=llama.MISSING)]

# Types of 256 weights a block need such a width.
WIDTH, TOKENS = 256, 64
COMMON: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig,
    "experts": lambda **options: Qwen3MoeConfig(
        **options, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=WIDTH, decoder_sparse_step=1
    ),
}  # fmt: skip
# The converter asks for a vocabulary in SentencePiece's format where the architecture had one.
TRAIN_VOCABULARY = """
import sys
from sentencepiece import SentencePieceTrainer
SentencePieceTrainer.train(input=sys.argv[1], model_prefix=sys.argv[2], vocab_size=400, byte_fallback=True)
"""


def make(kind: str, folder: Path, tokenizer: Any) -> Any:
    """A small random model with the tokenizer of a real one, saved."""
    torch.manual_seed(0)
    config = CONFIGS[kind](**COMMON, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model = Gemma3ForCausalLM(config) if kind == "gemma3" else AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "lm_head" not in name:
                # Larger weights than those that training begins with, so that layers matter for the scores.
                parameter.mul_(3 * (torch.rand(*parameter.shape[:-1], 1) + 0.5))
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind == "gemma3":
        from gptqmodel_eora_ext.evaluate.texts import demo_text

        command = [sys.executable, "-c", TRAIN_VOCABULARY, str(demo_text("heldout")), str(folder / "tokenizer")]
        environment = {**os.environ, "PYTHONPATH": str(llama.HOME / "python")}
        subprocess.run(command, check=True, capture_output=True, env=environment)
    return model.eval()


@pytest.fixture(scope="module")
def windows(token_ids: list[int]) -> list[dict[str, list[int]]]:
    return [{"input_ids": token_ids[i * TOKENS : (i + 1) * TOKENS], "attention_mask": [1] * TOKENS} for i in range(12)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[Any, Path, Path]:
    """A small Llama, its folder and its file in F16."""
    folder = tmp_path_factory.mktemp("small")
    model = make("llama", folder / "base", tokenizer)
    return model, folder / "base", llama.convert(folder / "base", folder / "f16.gguf")


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_base_in_gguf_is_the_model_that_it_was_made_from(
    kind: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = make(kind, tmp_path / "base", tokenizer)
    whole = llama.convert(tmp_path / "base", tmp_path / "f16.gguf", tokenizer="smollm")
    with quiet():
        folder = base_folder(str(whole))
        assert base_folder(str(whole)) == folder
    unpacked = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert unpacked.dtype == torch.float16
    ids = torch.tensor([[1 + one % 300 for one in range(TOKENS)]])
    with torch.no_grad():
        assert distance(unpacked.float()(ids).logits, model(ids).logits) < 2e-3


@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_applies_every_factor_where_it_belongs(
    kind: str, tmp_path: Path, tokenizer: Any, windows: Any
) -> None:
    """With factors of full rank Ŵ + B A is W, so llama.cpp's scores have to be those of the model in F16: any name, any
    order of rows, any scale or expert that was wrong would show."""
    make(kind, tmp_path / "base", tokenizer)
    whole = llama.convert(tmp_path / "base", tmp_path / "f16.gguf", tokenizer="smollm")
    # Embedding and output have no factors; in F16 they are out of the comparison.
    ends = ("--token-embedding-type", "f16", "--output-tensor-type", "f16")
    file = llama.quantize(whole, tmp_path / "q2.gguf", "Q2_K", *ends)
    with quiet():
        job = AdapterJob(str(tmp_path / "base"), file, windows, {"rank": WIDTH}, batch_size=4)
        adapter = adapter_maker(file)(job)
    ids = [1 + one % 300 for one in windows[0]["input_ids"]]
    expected = llamacpp_logits.logits_of_llama(whole, ids)
    plain = distance(llamacpp_logits.logits_of_llama(file, ids), expected)
    adapted = distance(llamacpp_logits.logits_of_llama(file, ids, adapter), expected)
    assert adapted < 0.2 * plain, (plain, adapted)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_llama_cpp_computes_what_was_solved_for(
    bits: int, small: tuple[Any, Path, Path], tmp_path: Path, windows: Any
) -> None:
    """Its scores with the adapter differ from torch's with Ŵ + B A of the same files by no more than without."""
    _, base, whole = small
    file = llama.quantize(whole, tmp_path / "q2.gguf", "Q2_K", "--pure")
    with quiet():
        job = AdapterJob(str(base), file, windows, {"rank": 64, "factor_bits": bits}, tmp_path / "l.gguf", batch_size=4)
        adapter = adapter_maker(file)(job)
    refined = tmp_path / "refined.gguf"
    with quiet():
        outcome = refine_checkpoint(file, str(base), windows, adapter=adapter, output=refined, window=TOKENS,
                                    tokens=TOKENS * len(windows))  # fmt: skip
    assert outcome.best is not None
    for one in (adapter, refined):
        found = llamacpp_logits.differences(base, file, one, "The history of the steam engine. " * 40, TOKENS)
        assert found["with adapter"]["rms"] < 1.5 * found["plain"]["rms"], found


def test_an_importance_matrix_and_a_plan_are_taken(
    small: tuple[Any, Path, Path], tmp_path: Path, windows: Any
) -> None:
    """IQ2_XS is refused without an importance matrix; the planned types are those of the file that comes out."""
    _, base, whole = small
    imatrix = tmp_path / "imatrix.gguf"
    with quiet():
        imatrix_maker(whole)(ImatrixJob(str(base), whole, windows, imatrix, "a text"))
    files = [
        llama.quantize(whole, tmp_path / f"{kind}.gguf", kind, "--imatrix", imatrix, "--pure",
                       "--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0")
        for kind in ("IQ2_XS", "Q3_K")
    ]  # fmt: skip
    with quiet():
        found = type_planner("llamacpp")(TypePlanJob(str(base), files, "2.9bpw", 4, "relative", windows))
    found.write(tmp_path / "plan.json")
    made = llama.quantize(whole, tmp_path / "planned.gguf", "Q2_K", "--imatrix", imatrix, "--tensor-type-file",
                          tmp_path / "plan.types.txt")  # fmt: skip
    planned = GGUFModel(made)
    assert len({one.type for one in found.plan.modules.values()}) == 2
    by_type = {GGUFModel(file).info("blk.0.attn_q.weight").type: GGUFModel(file) for file in files}
    for choice in found.plan.modules.values():
        assert planned.info(choice.tensor).type == choice.type
        # The quantiser has rounded the tensor as it did in the file that the forecast was made on.
        assert torch.equal(planned.read(choice.tensor), by_type[choice.type].read(choice.tensor))


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (2, 64)])
def test_an_exported_checkpoint_computes_what_its_weights_say(
    bits: int, group: int, small: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    model, base, whole = small
    weights = {name: packed(name, one.weight, bits, group) for name, one in linears(model).items()}
    exporter(whole)(ExportJob(checkpoint(tmp_path / "c", weights), whole, tmp_path / "out.gguf"))
    ids = list(range(5, 5 + TOKENS))
    reference, _ = llamacpp_logits.from_file(base, tmp_path / "out.gguf")
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    exported = distance(llamacpp_logits.logits_of_llama(tmp_path / "out.gguf", ids), expected)
    original = distance(llamacpp_logits.logits_of_llama(whole, ids), expected)
    # What is left is llama.cpp's rounding of activations. 8 bits differ from the original by no more than that.
    assert exported < 0.05 and (bits == 8 or exported < original / 2)
    assert GGUFModel(tmp_path / "out.gguf").info(tensor_of("model.layers.0.mlp.up_proj")).type[:2] == f"Q{bits}"


@pytest.mark.skipif(not (llama.PROGRAMS / "llama-server").is_file(), reason=llama.MISSING)
def test_the_server_scales_an_adapter_request_by_request(
    small: tuple[Any, Path, Path], tmp_path: Path, windows: Any
) -> None:
    _, base, whole = small
    file = llama.quantize(whole, tmp_path / "q2.gguf", "Q2_K", "--pure")
    with quiet():
        adapter = adapter_maker(file)(AdapterJob(str(base), file, windows, {"rank": 64}, batch_size=4))
    port = 18000 + os.getpid() % 1000
    address = f"http://127.0.0.1:{port}"
    command = [str(llama.PROGRAMS / "llama-server"), "-m", str(file), "--lora", str(adapter), "--port", str(port),
               "-c", "256", "-t", "2", "--no-warmup"]  # fmt: skip

    def ask(path: str, content: Any = None) -> Any:
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{address}{path}", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                if ask("/health")["status"] == "ok":
                    break
            except OSError:
                time.sleep(0.2)
        assert [one["scale"] for one in ask("/lora-adapters")] == [1.0]
        question = {"prompt": "The history of", "n_predict": 1, "temperature": 0, "n_probs": 5}
        chances = {
            scale: ask("/completion", {**question, "lora": [{"id": 0, "scale": scale}]})["completion_probabilities"]
            for scale in (0.0, 1.0)
        }
        assert chances[0.0] != chances[1.0]
        assert ask("/completion", question)["completion_probabilities"] == chances[1.0]
    finally:
        server.terminate()
        server.wait(30)
