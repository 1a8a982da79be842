"""Commands on GGUF files: what is refused before any work, and what an adapter's file tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from gptqmodel_eora_ext import cli
from gptqmodel_eora_ext.formats.gguf.lora import LoraPair, read_lora_header, write_lora
from tests.gguf_files import write_model

runner = CliRunner()
CALIBRATION = "The history of the steam engine begins in the first century. " * 40


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a model's config, a text, and an adapter in GGUF."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "c.txt").write_text(CALIBRATION)
    report = {"rank": 2, "tokens": 10, "signal": 4.0, "error_before": 2.0, "error_after": 0.5}
    pair = LoraPair(torch.ones(2, 32), torch.ones(8, 2))
    write_lora(tmp_path / "lora.gguf", "llama", {"blk.0.attn_q.weight": pair}, name="n", details={
        "objective": "eora", "method": "gguf Q2_K", "modules": {"model.layers.0.self_attn.q_proj": report},
    })  # fmt: skip
    return tmp_path


def run(*arguments: str | Path) -> tuple[int, str]:
    result = runner.invoke(cli.app, [str(one) for one in arguments])
    return result.exit_code, " ".join(result.output.split())


def test_an_adapters_file_is_inspected(files: Path) -> None:
    code, shown = run("inspect", files / "lora.gguf")
    assert code == 0
    for expected in ("1, rank 2", "factors in 16 bits", "after gguf Q2_K", "25.0% of the weighted error"):
        assert expected in shown
    code, shown = run("inspect", files / "c.txt")
    assert code == 2 and "is no GGUF file" in shown


def test_generate_refuses_what_is_no_gguf_file(files: Path) -> None:
    def generate(*more: str | Path) -> tuple[int, str]:
        return run("generate", files / "base", *more, "--calibration", files / "c.txt", "--rank", "4")

    code, shown = generate(files / "c.txt")
    assert code == 2 and "No adapter maker" in shown
    code, shown = generate(files / "lora.gguf", "--out", files / "lora.gguf")
    assert code == 2 and "is the checkpoint" in shown


def test_generate_makes_an_adapter_and_refines_it(tmp_path: Path, tokenizer: Any) -> None:
    """One command, two files: the adapter, and beside it what became of it."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    file = write_model(model, tmp_path / "model.gguf")
    (tmp_path / "long.txt").write_text(CALIBRATION * 8)
    code, shown = run("generate", tmp_path / "base", file, "--rank", "32", "--factor-bits", "4", "--samples", "4",
                      "--seqlen", "64", "--calibration", tmp_path / "long.txt", "--refine", "2560",
                      "--out", tmp_path / "eora.gguf")  # fmt: skip
    assert code == 0, shown
    assert "by kl on 2560 tokens" in shown
    assert read_lora_header(tmp_path / "eora.gguf").ranks == read_lora_header(tmp_path / "eora-refined.gguf").ranks


def test_refine_asks_for_the_adapters_file(files: Path) -> None:
    def refine(*more: str | Path) -> tuple[int, str]:
        return run("refine", files / "lora.gguf", "--base", files / "base", "--calibration", files / "c.txt", *more)

    for more, message in (
        ((), "names no adapter by itself"),
        (("--adapter", files / "base"), "is none"),
        (("--adapter", files / "lora.gguf", "--out", files / "lora.gguf"), "is the checkpoint"),
    ):
        code, shown = refine(*more)
        assert code == 2 and message in shown, (message, shown)
    code, shown = run("refine", files / "c.txt", "--base", files / "base", "--calibration", files / "c.txt",
                      "--adapter", files / "lora.gguf")  # fmt: skip
    assert code == 2 and "No file refiner" in shown


def test_a_plan_of_types_refuses_what_it_would_not_read(files: Path) -> None:
    def plan(*more: str | Path) -> tuple[int, str]:
        return run("plan", files / "base", "--calibration", files / "c.txt", *more)

    file, total = files / "lora.gguf", ("--total", "2.5bpw")
    for more, message in (
        (("--gguf", file), "needs a --host"),
        (("--host", "llamacpp", *total), "a --gguf for each type"),
        (("--host", "llamacpp", "--gguf", file), "needs a --total"),
        (("--host", "llamacpp", "--gguf", file, *total, "--bits", "3"), "--bits says how GPTQModel will round"),
        (("--host", "llamacpp", "--gguf", files / "none", *total), "there is no file"),
        (("--host", "llamacpp", "--gguf", file, *total, "--factor-bits", "8", "--factor-bits", "4"), "one width"),
        (("--host", "nobody", "--gguf", file, *total), "No type planner for `nobody`"),
        (("--host", "llamacpp", "--gguf", file, "--total", "much"), "--total must be"),
    ):
        code, shown = plan(*more)
        assert code == 2 and message in shown, (message, shown)


def test_export_and_imatrix_refuse_before_any_work(files: Path) -> None:
    file = files / "lora.gguf"
    for arguments, message in (
        (("export", files / "base"), "one of --peft, --packed and --gguf"),
        (("export", files / "base", "--gguf", files / "o.gguf"), "needs --like"),
        (("export", files / "base", "--peft", files / "o", "--like", file), "are for --gguf"),
        (("export", files / "base", "--gguf", file, "--like", file), "is what is read from"),
        (("export", files / "none", "--gguf", files / "o.gguf", "--like", file), "is no folder"),
        (("export", files / "base", "--gguf", files / "o.gguf", "--like", file), "expected a model"),
        (("imatrix", files / "base", files / "none", "--calibration", "x", "--out", files / "o"), "there is no file"),
        (("imatrix", files / "base", file, "--calibration", "x", "--out", file), "is the model"),
    ):
        code, shown = run(*arguments)
        assert code == 2 and message in shown, (message, shown)
