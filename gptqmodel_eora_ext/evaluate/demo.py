"""The main job on a real model: a planned mix, its adapter refined, beside plain GPTQ that is no smaller, from disk."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..system.logs import only_from
from ..system.progress import counted
from .models import smollm2
from .record import NAME, read_record, write_record
from .texts import demo_text

__all__ = ["DEFAULT_TOTAL", "demo_text", "run_demo"]

QUANTIZER = "gptq"
GROUP_SIZE = 64
# Plain 3 bits with their scales and zeros are 3.30 bits per weight: the mix is held to a little less.
PLAIN_BITS = 3
DEFAULT_TOTAL = "3.25bpw"
FACTOR_BITS = 4
SENSITIVITY = "fisher"
# Components that are forecast. In SmolLM2's largest layers (576 × 1536) 4-bit factors of this rank take a bit a weight,
# for which the next width of the weights is to be had; a plan for 3.25 bits takes up to 72.
MOST_RANK = 96
# 8k tokens: on two cores a layer takes 3 seconds, and the whole demo stays under ten minutes.
SAMPLES, SEQLEN, BATCH_SIZE = 32, 256, 8
# Both models are rounded in the same way. A symmetric scale wastes levels where there are few of them. GPTQModel's
# search for scales (`mse=2.4`) does better still, but would take the demo past ten minutes.
SYMMETRIC, SCALE_SEARCH = False, 0.0
# 48 windows, of which 9 validate and 39 are a step each. The text that comes with the package fills not many more, and
# on two cores a step takes four seconds.
REFINE_TOKENS = 48 * 512
WINDOW, MAX_WINDOWS = 512, 16
BASE_NAME, PLAIN_NAME, MIX_NAME = "SmolLM2-135M", f"plain GPTQ, {PLAIN_BITS} bits", "planned mix, refined"
# What `demo_text("heldout")` holds.
TEXT_NAME = "Emma"
PLAIN, MIX, REPORT = "plain", "eora", "report.html"
PROMPTS = ("The capital of France is", "Once upon a time, a small robot")

Progress = Callable[[str], Callable[[int, int], None]]


def run_demo(output: Path, *, total: str, progress: Progress) -> tuple[dict[str, Any], float]:
    """Run the demo and return its record (`evaluate.record`) and the seconds in all.

    Args:
        output: folder for the two checkpoints, `plain` and `eora`, the plan, `report.json` and `report.html`.
        total: bytes of the mix, as `3.25bpw`.
        progress: makes a `report(done, total)` callback for a named step.

    Raises:
        ValueError: for a total that is below what 2 bits take.
        RuntimeError: when the measuring process fails.
    """
    from .report.page import make_report, require_report_libraries

    require_report_libraries()
    begin = time.perf_counter()
    stages: list[dict[str, Any]] = []

    @contextmanager
    def stage(name: str) -> Iterator[Callable[[int, int], None]]:
        start = time.perf_counter()
        report = progress(name)
        report(0, 1)
        yield report
        report(1, 1)
        stages.append({"name": name, "seconds": round(time.perf_counter() - start, 1)})

    output.mkdir(parents=True, exist_ok=True)
    # Whoever watches the demo has nothing to do about the package's log lines below an error.
    with only_from(logging.ERROR, __package__.split(".")[0]):
        with stage("fetching SmolLM2-135M") as report:
            base = smollm2(report=report)
        with stage("planning bits and ranks"):
            plan = _plan(base, total, progress)
            plan.write(output / "plan.json")
        with stage(f"quantising: {PLAIN_NAME}") as report:
            _quantize(base, output / PLAIN, None, report)
        with stage("quantising: planned mix") as report:
            _quantize(base, output / MIX, plan, report)
        with stage("refining the mix's adapter") as report:
            _refine(base, output / MIX, report)
        with stage("measuring all three"):
            record = _measured_in_new_process(base, output)
    record = {
        **record,
        "texts": [{**text, "name": TEXT_NAME} for text in record["texts"]],
        "title": f"SmolLM2-135M: a planned and refined mix at {total} beside plain {PLAIN_BITS} bits",
        "stages": stages,
        "settings": {
            **record["settings"], "total": total, "group_size": GROUP_SIZE, "sym": SYMMETRIC, "mse": SCALE_SEARCH,
            "calibration": f"{SAMPLES} windows of {SEQLEN} tokens", "factor_bits": FACTOR_BITS,
            "refined_on": f"{REFINE_TOKENS} tokens",
        },
    }  # fmt: skip
    write_record(output / NAME, record)
    make_report(output / REPORT)
    return record, time.perf_counter() - begin


def _windows(base: Path) -> list[dict[str, list[int]]]:
    from transformers import AutoTokenizer

    from ..calibration import read_texts, windows

    texts = read_texts(str(demo_text("calibration")))
    return windows(texts, AutoTokenizer.from_pretrained(base), samples=SAMPLES, seqlen=SEQLEN)


def _plan(base: Path, total: str, progress: Progress) -> Any:
    """Bits and ranks of every module for a total, by forecasts on the calibration text."""
    from ..adapter.budget import budget_bytes
    from ..hosts.registry import planner
    from ..hosts.terminal import quiet
    from ..plan import PLANNED_BITS, largest_rank, plan_question, planned, planned_modules
    from ..solve import Grid

    grid = Grid(GROUP_SIZE, SYMMETRIC, SCALE_SEARCH)
    with quiet():
        settings = {"bits": PLAIN_BITS, "group_size": GROUP_SIZE, "sym": SYMMETRIC}
        opened = planner(QUANTIZER)(str(base), settings, False)
        size = budget_bytes(total, opened.shapes)
        most = min(MOST_RANK, largest_rank(opened.shapes, size, PLANNED_BITS[0], GROUP_SIZE, FACTOR_BITS))
        question = plan_question(opened.shapes, grid, most=most)
        swept = opened.survey(_windows(base), question, SENSITIVITY, lambda title: counted(progress(title)))
        modules = planned_modules(opened.shapes, swept)
        return planned(modules, size, grid, FACTOR_BITS, model=BASE_NAME, sensitivity=SENSITIVITY)


def _quantize(base: Path, folder: Path, plan: Any, report: Callable[[int, int], None]) -> None:
    from ..hosts.jobs import QuantizeJob
    from ..hosts.registry import quantizer
    from ..hosts.terminal import quiet

    plain = {"bits": PLAIN_BITS, "group_size": GROUP_SIZE, "sym": SYMMETRIC, "mse": SCALE_SEARCH}
    with quiet():
        job = QuantizeJob(
            model=str(base),
            output=folder,
            windows=_windows(base),
            settings=plain if plan is None else plan.quantize_config(),
            plan=plan,
            batch_size=BATCH_SIZE,
            report=report,
        )
        quantizer(QUANTIZER)(job)


def _refine(base: Path, folder: Path, report: Callable[..., None]) -> None:
    """Train the mix's adapter by what the whole model loses; the checkpoint names the refined one from then on."""
    from ..hosts.refine import refine_checkpoint
    from ..hosts.terminal import quiet

    with quiet():
        refine_checkpoint(folder, str(base), str(demo_text("calibration")), tokens=REFINE_TOKENS, training=report)


def _measured_in_new_process(base: Path, output: Path) -> dict[str, Any]:
    """What `eora eval` tells of the three models, loaded from disk by a process that has made none of them."""
    models = [f"{PLAIN_NAME}={output / PLAIN}", f"{MIX_NAME}={output / MIX}"]
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    found = output / NAME
    command = [sys.executable, "-m", "gptqmodel_eora_ext.cli", "eval", *models, "--base", f"{BASE_NAME}={base}",
               "--adapters-only", "--text", str(demo_text("heldout")), "--window", str(WINDOW), "--max-windows",
               str(MAX_WINDOWS), *prompts, "--speed", "--out", str(found)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr.strip()[-2000:]}")
    return read_record(found)
