"""Logits of llama.cpp, through llama-cpp-python, beside those that torch computes with the very values of the files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import llamacpp_tools as llama
import torch
from transformers import AutoModelForCausalLM

from gptqmodel_eora_ext.adapter.layers import shape_of
from gptqmodel_eora_ext.formats.gguf.lora import SUFFIX_A, SUFFIX_B, read_lora_header
from gptqmodel_eora_ext.formats.gguf.model import GGUFModel, read_tensor
from gptqmodel_eora_ext.hosts.llamacpp.weights import GGUFWeights

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def bindings() -> Any:
    """llama-cpp-python, over the libraries of `make llamacpp`."""
    for path in (llama.HOME / "python", llama.HOME / "source"):
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
    os.environ["LLAMA_CPP_LIB_PATH"] = str(llama.PROGRAMS)
    import llama_cpp

    return llama_cpp


def logits_of_llama(model: Path, ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    """Tokens × vocabulary, float32, as llama.cpp computes them on the CPU."""
    found = bindings().Llama(
        str(model), n_ctx=len(ids), n_batch=len(ids), logits_all=True, n_threads=2, verbose=False,
        lora_path=None if adapter is None else str(adapter),
    )  # fmt: skip
    found.eval(ids)
    return torch.from_numpy(found.scores[: len(ids)].copy())


def tokens_of(model: Path, text: str) -> list[int]:
    """A text in the tokens of the file's own vocabulary."""
    found = bindings().Llama(str(model), vocab_only=True, verbose=False)
    return list(found.tokenize(text.encode(), add_bos=False))


def from_file(base: Path, file: Path) -> tuple[Any, GGUFWeights]:
    """The model in float32 with the dequantised values of a GGUF file in its linear layers, embedding and head."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    gguf = GGUFModel(file)
    modules = model.model.layers.named_modules()
    linears = {f"model.layers.{name}": one for name, one in modules if isinstance(one, torch.nn.Linear)}
    weights = GGUFWeights(gguf, str(base))
    shapes = [shape_of(name, one) for name, one in linears.items()]
    with torch.no_grad():
        for name, read in weights.known(shapes, lambda name: linears[name].weight.data).items():
            linears[name].weight.copy_(read(linears[name].weight.data))
        embedding = gguf.read(EMBEDDING)
        model.get_input_embeddings().weight.copy_(embedding)
        model.get_output_embeddings().weight = torch.nn.Parameter(
            gguf.read(HEAD) if HEAD in gguf.tensors else embedding
        )
    return model, weights


def add_adapter(model: Any, weights: GGUFWeights, adapter: Path) -> None:
    """Ŵ + B A in each linear layer, from the values that the adapter's file holds."""
    tensors = read_lora_header(adapter).header.tensors
    with torch.no_grad():
        for name, one in weights.placed.items():
            pair = [tensors.get(f"{one.place.tensor}{suffix}") for suffix in (SUFFIX_B, SUFFIX_A)]
            if pair[0] is not None and pair[1] is not None:
                lora_B, lora_A = read_tensor(pair[0]), read_tensor(pair[1])
                model.get_submodule(name).weight.add_(one.in_model_order(lora_B) @ lora_A)


def differences(base: Path, file: Path, adapter: Path, text: str, tokens: int) -> dict[str, Any]:
    """Largest and root mean square difference of logits, without the adapter and with it.

    What llama.cpp differs by without one is its own: it rounds activations to 8 bits in front of every product.
    """
    ids = tokens_of(file, text[: 16 * tokens])[:tokens]
    model, weights = from_file(base, file)
    found: dict[str, Any] = {"tokens": len(ids)}
    for label, lora in (("plain", None), ("with adapter", adapter)):
        if lora is not None:
            add_adapter(model, weights, lora)
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0]
        gap = logits_of_llama(file, ids, lora) - expected
        found[label] = {
            "largest": float(gap.abs().max()), "rms": float(gap.square().mean().sqrt()),
            "rms of logits": float(expected.square().mean().sqrt()),
        }  # fmt: skip
    return found
