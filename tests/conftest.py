"""Shared fixtures: small random models of real architectures, and SmolLM2 for the end-to-end set."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SEQLEN = 64


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For what is compared with processes of one thread: products of a handful of rows depend on the number of them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def little_garbage() -> Iterator[None]:
    """Leave what imports have made, a million objects, out of garbage collection.

    Hosts collect garbage after every module that they quantise, and would go through all of it each time: for models as
    small as these that took most of the time.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder."""
    from gptqmodel_eora_ext.evaluate.models import smollm2

    return smollm2()


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def token_ids(tokenizer: Any) -> list[int]:
    """The package's calibration text, tokenized."""
    from gptqmodel_eora_ext.evaluate.demo import demo_text

    ids: list[int] = tokenizer(demo_text("calibration").read_text(encoding="utf-8")).input_ids
    return ids


@pytest.fixture(scope="session")
def calibration(token_ids: list[int]) -> list[dict[str, list[int]]]:
    """Sixteen windows of real text."""
    return [{"input_ids": token_ids[i * SEQLEN : (i + 1) * SEQLEN], "attention_mask": [1] * SEQLEN} for i in range(16)]


@pytest.fixture(scope="session")
def two_layers(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The first two layers of SmolLM2: real weights and real activations at a fifteenth of the time."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("two-layers")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.config.layer_types = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
