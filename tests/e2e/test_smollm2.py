"""The whole of SmolLM2 through the command: quantise, inspect, evaluate, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.evaluate.demo import demo_text
from gptqmodel_eora_ext.evaluate.perplexity import text_loss

pytestmark = pytest.mark.e2e

WINDOW, WINDOWS = 256, 8


def eora(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "gptqmodel_eora_ext.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_quantize_inspect_eval(smollm2: Path, tokenizer: Any, tmp_path: Path) -> None:
    calibration = ["--calibration", str(demo_text("calibration")), "--samples", "16", "--seqlen", "128"]
    eora(
        "quantize", str(smollm2), "out", "--bits", "3", "--rank", "32", "--batch-size", "8", *calibration, cwd=tmp_path
    )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]

    summary = json.loads(eora("inspect", "out", "--json", cwd=tmp_path))
    assert len(summary["modules"]) == 210
    assert summary["calibration"]["tokens"] == 16 * 128
    for name, module in summary["modules"].items():
        assert module["rank"] == 32 and module["error_after"] < module["error_before"], name

    text = ["--text", str(demo_text("heldout")), "--window", str(WINDOW), "--max-windows", str(WINDOWS)]
    plain, adapted = json.loads(eora("eval", "out", *text, "--json", cwd=tmp_path))
    assert adapted["adapter_bytes"] == (tmp_path / "out" / "eora" / "adapter_model.safetensors").stat().st_size

    from transformers import AutoModelForCausalLM

    ids = torch.tensor(tokenizer(demo_text("heldout").read_text(encoding="utf-8")).input_ids)
    full = text_loss(AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto"), ids, window=WINDOW,
                     max_windows=WINDOWS)  # fmt: skip
    # 3 bits cost SmolLM2 about a nat, of which rank 32 leaves less than half; without its adapter the checkpoint,
    # calibrated to have one, does worse than plain 3 bits.
    assert full.nats < adapted["nats"] < full.nats + 1
    assert adapted["nats"] < plain["nats"]
