"""The table of docs/autoround.md that tells which families' exports are made, and who opens them with their adapter."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from auto_round import AutoRound
from gptqmodel import BACKEND
from peft.tuners.lora.layer import LoraLayer
from transformers import AutoModelForCausalLM

from gptqmodel_eora_ext import EoRAConfig, load_peft

from .helpers import Batches, kernels, load

pytestmark = pytest.mark.e2e

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Llama": (transformers.LlamaConfig, {}),
    "Qwen2": (transformers.Qwen2Config, {}),
    "Qwen3": (transformers.Qwen3Config, {"head_dim": 32}),
    "Gemma": (transformers.GemmaConfig, {"head_dim": 32}),
    "Phi-3": (transformers.Phi3Config, {"pad_token_id": 0}),
    "Mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
}
FORMATS = ("auto_round", "auto_gptq", "auto_awq")
# GPTQModel's logits are nearer to PEFT's than this share of what the adapter changes in them. GPTQModel multiplies
# factors in 16 bits, PEFT in float32.
NEAR = 0.5


def told() -> dict[str, dict[str, str]]:
    """The table: family → format → word."""
    text = (Path(__file__).parents[2] / "docs" / "autoround.md").read_text(encoding="utf-8")
    head, _, *rows = re.search(r"(?m)^\| family (?:.*\n)((?:\|.*\n)+)", text)[0].splitlines()  # type: ignore[index]
    cells = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in (head, *rows)]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[1:]}


def found(base: Path, tokenizer: Any, calibration: Batches, form: str, out: Path) -> str:
    """Make an export with an adapter and open it: the word that the table should have."""
    data = [torch.tensor([window["input_ids"]]) for window in calibration[:4]]
    rounder = AutoRound(str(base), tokenizer=tokenizer, device_map="cpu", alg_configs=["signround", EoRAConfig(rank=8)],
                        scheme="W4A16", group_size=32, nsamples=4, seqlen=64, batch_size=4, iters=1,
                        dataset=data)  # fmt: skip
    try:
        folder = Path(rounder.quantize_and_save(str(out), format=form)[1])
    except NotImplementedError as error:
        assert "of type mixtral in its files, and would stop" in str(error)
        return "not made"
    with torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu")
        without = plain(data[0]).logits.float()
        adapted = load_peft(plain, folder / "eora")
        theirs = adapted(data[0]).logits.float()
        assert sum(isinstance(module, LoraLayer) for module in adapted.modules()) >= 4
        changed = float((without - theirs).norm())
        assert changed > 0
        try:
            model = load(folder, backend=BACKEND.AWQ_TORCH if form == "auto_awq" else BACKEND.GPTQ_TORCH)
        except NotImplementedError as error:
            assert "gate_up_proj, which GPTQModel splits in models of type phi3" in str(error)
            return "transformers"
        assert all(kernel.adapter.lora_A is not None for kernel in kernels(model).values())
        assert float((model(data[0]).logits.float() - theirs).norm()) < NEAR * changed
    return "both"


def test_the_table_lists_what_is_tried() -> None:
    assert {family: set(row) for family, row in told().items()} == {family: set(FORMATS) for family in FAMILIES}


@pytest.fixture(scope="module")
def fresh() -> Iterator[ProcessPoolExecutor]:
    """A process that has loaded nothing yet.

    GPTQModel replaces transformers' class of Mixtral's experts for as long as a process lives, and AutoRound then reads
    and writes other files.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def words(family: str, tokenizer: Any, calibration: Batches, folder: Path) -> dict[str, str]:
    """What happens to a family's exports, by format."""
    # As `little_garbage` does in the tests' own process.
    gc.freeze()
    config, options = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(vocab_size=len(tokenizer), **SHAPE, **options)).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return {form: found(folder / "base", tokenizer, calibration, form, folder / form) for form in FORMATS}


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_are_made_and_opened_as_the_table_says(
    family: str, tokenizer: Any, calibration: Batches, tmp_path: Path, fresh: ProcessPoolExecutor
) -> None:
    assert fresh.submit(words, family, tokenizer, calibration, tmp_path).result() == told()[family]
