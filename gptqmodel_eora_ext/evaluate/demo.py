"""The main job on a real model: quantise with and without an adapter, load both from disk in new processes, compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from .models import smollm2
from .size import weight_bytes

QUANTIZER = "gptq"
GROUP_SIZE = 64
# 8k tokens: on two cores a layer takes 3 seconds, and the whole demo stays under ten minutes.
SAMPLES, SEQLEN, BATCH_SIZE = 32, 256, 8
# At 2 bits a symmetric scale set by the largest weight wastes half of the four levels. GPTQModel's search for scales
# (`mse=2.4`) does better than asymmetric ones, but would take the demo past ten minutes.
SYMMETRIC = False
WINDOW, MAX_WINDOWS = 512, 16

Progress = Callable[[str], Callable[[int, int], None]]


def demo_text(name: str) -> Path:
    """`calibration` or `heldout`: public-domain text that comes with the package."""
    return Path(str(files(__package__) / "text" / f"{name}.txt"))


def run_demo(output: Path, *, bits: int, rank: int, progress: Progress) -> tuple[list[dict[str, Any]], float]:
    """Run the demo and return the table's rows and the seconds in all.

    Args:
        output: folder for the two checkpoints, `plain` and `eora`.
        bits: quantised bits.
        rank: adapter rank.
        progress: makes a `report(done, total)` callback for a named step.
    """
    start = time.perf_counter()
    report = progress("fetching SmolLM2-135M")
    base = smollm2(report=report)
    report(1, 1)
    rows = [_full_precision(base, progress("full precision"))]
    for name, title, adapter_rank in (("plain", "quantised", None), ("eora", f"quantised + EoRA r{rank}", rank)):
        folder = output / name
        seconds = _quantize(base, folder, bits, adapter_rank, progress(f"{title}: layers"))
        report = progress(f"{title}: load and measure")
        report(0, 1)
        measured = _measure_in_new_process(folder)[-1]
        report(1, 1)
        rows.append({**measured, "model": title, "seconds": seconds})
    return rows, time.perf_counter() - start


def _full_precision(base: Path, report: Callable[[int, int], None]) -> dict[str, Any]:
    from ..hosts.terminal import without_library_bars, without_noise

    start = time.perf_counter()
    with without_noise(), without_library_bars():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from .perplexity import text_loss, text_tokens

        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(base)
    ids = text_tokens(demo_text("heldout"), tokenizer, window=WINDOW, max_windows=MAX_WINDOWS)
    loss = text_loss(model, ids, window=WINDOW, max_windows=MAX_WINDOWS, progress=report)
    return {
        "model": "full precision",
        "perplexity": loss.perplexity,
        "bytes": weight_bytes(base),
        "adapter_bytes": 0,
        "seconds": time.perf_counter() - start,
    }


def _quantize(base: Path, folder: Path, bits: int, rank: int | None, report: Callable[[int, int], None]) -> float:
    from transformers import AutoTokenizer

    from ..calibration import read_texts, windows
    from ..hosts.registry import QuantizeJob, quantizer
    from ..hosts.terminal import quiet

    start = time.perf_counter()
    with quiet():
        texts = read_texts(str(demo_text("calibration")))
        job = QuantizeJob(
            model=str(base),
            output=folder,
            windows=windows(texts, AutoTokenizer.from_pretrained(base), samples=SAMPLES, seqlen=SEQLEN),
            settings={"bits": bits, "group_size": GROUP_SIZE, "sym": SYMMETRIC},
            adapter={"rank": rank} if rank else None,
            batch_size=BATCH_SIZE,
            report=report,
        )
        quantizer(QUANTIZER)(job)
    return time.perf_counter() - start


def _measure_in_new_process(folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "gptqmodel_eora_ext.cli", "eval", str(folder), "--text", str(demo_text("heldout")),
               "--window", str(WINDOW), "--max-windows", str(MAX_WINDOWS), "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr.strip()[-2000:]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows
