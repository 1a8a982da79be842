"""What the benchmarks share: the model, the text, the machine, and a dense copy of a quantised model."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The host's loader pool needs two workers; stock GPTQModel does not give them on two processors.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch

from gptqmodel_eora_ext import __version__
from gptqmodel_eora_ext.evaluate.models import SMOLLM2, smollm2
from gptqmodel_eora_ext.evaluate.perplexity import text_loss

RESULTS = Path(__file__).parent / "results"
# Text for benchmarks is not part of the product: WikiText-2 is CC BY-SA. The folder holds the four files named below.
DATA = Path(os.environ.get("EORA_BENCHMARK_DATA", Path(__file__).parents[2] / "shared" / "data" / "text"))
CALIBRATION_TEXT = "web_c4_1480docs_train.txt"
HELD_OUT = {"wikitext2": "wikitext2_raw_test.txt", "c4": "web_c4_1480docs_heldout.txt"}
BATCH_SIZE = 8
EVALUATION_WINDOW = 512


def read(name: str) -> str:
    """A text of the benchmark data."""
    path = DATA / name
    if not path.is_file():
        raise SystemExit(f"{path} is missing. Set EORA_BENCHMARK_DATA to a folder that holds {name}.")
    return path.read_text(encoding="utf-8")


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2())


def calibration(samples: int, seqlen: int) -> list[dict[str, list[int]]]:
    """C4 training text, cut into windows."""
    ids = tokenizer()(read(CALIBRATION_TEXT)).input_ids
    return [{"input_ids": ids[i * seqlen : (i + 1) * seqlen], "attention_mask": [1] * seqlen} for i in range(samples)]


def held_out() -> dict[str, torch.Tensor]:
    """Token ids of the held-out texts."""
    tokenize = tokenizer()
    return {name: torch.tensor(tokenize(read(file)[:400_000]).input_ids) for name, file in HELD_OUT.items()}


def losses(model: Any, texts: dict[str, torch.Tensor], windows: int) -> dict[str, float]:
    """Nats per token on each text."""
    return {
        name: text_loss(model, ids, window=EVALUATION_WINDOW, max_windows=windows).nats for name, ids in texts.items()
    }


def device() -> str:
    """Where models are quantised and evaluated; `CUDA_VISIBLE_DEVICES=` keeps them off a GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def base_model(folder: Path | None = None) -> Any:
    """SmolLM2 (or what `first_layers` made of it) at full precision, bfloat16."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder or smollm2(), dtype=torch.bfloat16)


def first_layers(folder: Path, layers: int) -> Path:
    """The model cut to its first layers, in ``folder``; 0 layers for the whole model as it is."""
    from transformers import AutoModelForCausalLM

    base = smollm2()
    if layers == 0:
        return base
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.config.layer_types = None
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def densified(checkpoint: str | Path, adapter: Any = None, base: Path | None = None) -> Any:
    """The full-precision architecture with each weight set to Ŵ + BA, as GPTQModel loads them: fast to evaluate."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    from gptqmodel_eora_ext.hosts.gptqmodel.weights import dequantize

    quantized = GPTQModel.load(str(checkpoint), adapter=adapter, backend=BACKEND.GPTQ_TORCH)
    dense = base_model(base)
    for name, kernel in quantized.model.named_modules():
        if not isinstance(kernel, BaseQuantLinear):
            continue
        weight = dequantize(kernel).to(torch.float32)
        # A module may have no factors: rank 0 under a budget.
        if kernel.adapter is not None and kernel.adapter.lora_A is not None:
            weight += (kernel.adapter.lora_A.to(torch.float32) @ kernel.adapter.lora_B.to(torch.float32)).T
        dense.get_submodule(name).weight.data = weight.to(torch.bfloat16).cpu()
    return dense


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="eora-benchmark-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment() -> dict[str, Any]:
    """The machine and versions, kept with every result."""
    names = ("gptqmodel", "torch", "transformers", "peft")
    return {
        "model": SMOLLM2.name,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "python": platform.python_version(),
        "gptqmodel-eora-ext": __version__,
        **{name: version(name) for name in names},
    }


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def keep(name: str, result: dict[str, Any], *, as_json: bool) -> None:
    """Write a result to `results/`, and print it."""
    RESULTS.mkdir(exist_ok=True)
    content = json.dumps({"environment": environment(), **result}, indent=2)
    (RESULTS / f"{name}.json").write_text(content + "\n", encoding="utf-8")
    if as_json:
        print(content)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, of values without ties."""
    ranks = torch.stack([torch.tensor(list(one)).argsort().argsort() for one in (first, second)])
    return float(torch.corrcoef(ranks.float())[0, 1])


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(*header)
    for row in rows:
        shown.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=120).print(shown)
