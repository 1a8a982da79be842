"""A tiny model, quantised, with an ensemble whose domains are ranges of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from gptqmodel_eora_ext.hosts.ensemble_making import EnsembleJob
from gptqmodel_eora_ext.hosts.terminal import quiet

LAYERS, HIDDEN, VOCABULARY = 4, 64, 512
SAMPLES, SEQLEN = 8, 64
# Tokens of each kind of text; "foreign" is of no domain.
KINDS = {"shared": (0, 120), "math": (120, 240), "code": (240, 360), "foreign": (360, 480)}


def windows(kind: str, count: int, *, seed: int = 0, seqlen: int = SEQLEN) -> list[dict[str, list[int]]]:
    first, last = KINDS[kind]
    ids = torch.randint(first, last, (count, seqlen), generator=torch.Generator().manual_seed(seed + first))
    return [{"input_ids": row.tolist(), "attention_mask": [1] * seqlen} for row in ids]


def tiny_checkpoint(folder: Path, tokenizer: Any, seed: int = 0) -> tuple[Path, Path]:
    """A random model at full precision, and the same in 2 bits."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=LAYERS,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    base, checkpoint = folder / "base", folder / "checkpoint"
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    with quiet():
        host = GPTQModel.load(str(base), QuantizeConfig(bits=2, group_size=32))
        host.quantize(windows("shared", 4) + windows("math", 4), batch_size=4)
        host.save(str(checkpoint))
    return base, checkpoint


def job(base: Path, checkpoint: Path, output: Path, domains: tuple[str, ...] = ("math", "code"), **more: Any) -> Any:
    """What makes an ensemble for the tiny model; windows beyond `SAMPLES` are the router's alone."""
    texts = {name: windows(name, 4 * SAMPLES) for name in domains}
    more.setdefault("budget", "r12")
    more.setdefault("adapter", {"sensitivity": "uniform", "factor_bits": 16})
    return EnsembleJob(base=str(base), checkpoint=checkpoint, output=output, shared=windows("shared", 4 * SAMPLES),
                       domains=texts, samples=SAMPLES, batch_size=4, **more)  # fmt: skip


def prompts(*kinds: str, length: int = 32, seed: int = 9) -> torch.Tensor:
    return torch.tensor([windows(kind, 1, seed=seed + row, seqlen=length)[0]["input_ids"]
                         for row, kind in enumerate(kinds)])  # fmt: skip


