"""What the benchmarks share: the model, the text, results with their origin, and a copy that is quick to evaluate."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The host's loader pool needs two workers; stock GPTQModel does not give them on two processors.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch

from gptqmodel_eora_ext import __version__
from gptqmodel_eora_ext.evaluate.models import QWEN_CODER, SMOLLM2, qwen_coder, smollm2
from gptqmodel_eora_ext.evaluate.perplexity import text_loss
from gptqmodel_eora_ext.system.files import write_json

RESULTS = Path(__file__).parent / "results"
# Text for benchmarks is not part of the product: WikiText-2 is CC BY-SA. The folder holds the files named below.
DATA = Path(os.environ.get("EORA_BENCHMARK_DATA", Path(__file__).parents[2] / "shared" / "data" / "text"))
CODE = "code_python_stdlib_train.txt"
CALIBRATION_TEXTS = {"c4": "web_c4_1480docs_train.txt", "code": CODE}
HELD_OUT = {"wikitext2": "wikitext2_raw_test.txt", "c4": "web_c4_1480docs_heldout.txt", "code": CODE}
# There is one text of code. Its last tenth, from the beginning of a file on, is held out; calibration sees the rest.
CODE_SEEN = 0.9
CODE_FILE = "\n# file: "
# More than any benchmark evaluates, and little to tokenize.
HELD_OUT_CHARACTERS = 400_000
BATCH_SIZE = 8
EVALUATION_WINDOW = 512

MODELS = {"smollm2": (SMOLLM2, smollm2), "qwen-coder": (QWEN_CODER, qwen_coder)}
DEFAULT_MODEL = "smollm2"


@dataclass(frozen=True)
class Subject:
    """What a benchmark measures.

    Attributes:
        name: of the model, as results and tables call it.
        folder: the model at full precision.
        suffix: what the names of its results files end with: nothing for SmolLM2, whole and calibrated on C4.
        calibration: "c4" or "code", the text to calibrate on.
        bits: how many bits the folder's weights were stored in before it was made; None where that is not known.
        quantized_layers: only so many of the first layers are quantised, the others stay as they are; 0 for all.
    """

    name: str
    folder: Path
    suffix: str = ""
    calibration: str = "c4"
    bits: int | None = None
    quantized_layers: int = 0

    def quantizes(self, name: str) -> bool:
        """Whether a module, by its full name, is among the layers that are quantised."""
        number = re.search(r"\.layers\.(\d+)\.", name)
        return not self.quantized_layers or (number is not None and int(number[1]) < self.quantized_layers)

    def dynamic(self) -> dict[str, dict[str, Any]] | None:
        """What tells GPTQModel to leave the other layers out."""
        if not self.quantized_layers:
            return None
        layers = json.loads((self.folder / "config.json").read_text())["num_hidden_layers"]
        left_out = "|".join(map(str, range(self.quantized_layers, layers)))
        return {rf"-:^model\.layers\.({left_out})\.": {}} if left_out else None

    def results(self, name: str) -> Path:
        """The file for what is measured of this model."""
        return RESULTS / f"{name}{self.suffix}.json"


def add_model(parser: argparse.ArgumentParser, *, layers: bool = True, quantized_layers: bool = False) -> None:
    """Add the options that `subject` reads.

    Args:
        parser: of the benchmark.
        layers: whether the benchmark can do with the first layers of a model in place of the model.
        quantized_layers: whether it can quantise the first layers alone.
    """
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"{', '.join(MODELS)}, or a model's folder")
    parser.add_argument("--calibration", choices=CALIBRATION_TEXTS, default="c4", help="text to calibrate on")
    if layers:
        parser.add_argument("--layers", type=int, default=0, help="only the first so many layers; 0 is the whole model")
    if quantized_layers:
        parser.add_argument(
            "--quantized-layers", type=int, default=0, help="the whole model, its first so many layers quantised"
        )


@contextmanager
def subject(options: argparse.Namespace) -> Iterator[Subject]:
    """The model that the command line names, cut to its first layers where it says so."""
    bits = None
    if options.model in MODELS:
        model, make = MODELS[options.model]
        name, folder, bits = model.name, make(), model.bits
        suffix = "" if options.model == DEFAULT_MODEL else f"_{options.model}"
    else:
        folder = Path(options.model).resolve()
        name, suffix = folder.name, f"_{folder.name}"
        if not (folder / "config.json").is_file():
            known = ", ".join(MODELS)
            raise SystemExit(f"--model {options.model}: expected {known}, or a folder with a config.json.")
    suffix += "" if options.calibration == "c4" else f"_on_{options.calibration}"
    if first := getattr(options, "quantized_layers", 0):
        name, suffix = f"{name}, first {first} layers quantised", f"{suffix}_first_{first}"
    chosen = Subject(name, folder, suffix, options.calibration, bits, first)
    layers = getattr(options, "layers", 0)
    if not layers:
        yield chosen
        return
    with scratch() as cut:
        yield first_layers(chosen, layers, cut)


def first_layers(whole: Subject, layers: int, folder: Path) -> Subject:
    """The model cut to its first layers, in ``folder``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole.folder, dtype="auto")
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.config.layer_types = None
    model.save_pretrained(folder)
    tokenizer(whole).save_pretrained(folder)
    return replace(
        whole, name=f"{whole.name}, first {layers} layers", folder=folder, suffix=f"{whole.suffix}_{layers}_layers"
    )


def read(name: str) -> str:
    """A text of the benchmark data."""
    path = DATA / name
    if not path.is_file():
        raise SystemExit(f"{path} is missing. Set EORA_BENCHMARK_DATA to a folder that holds {name}.")
    return path.read_text(encoding="utf-8")


def read_part(name: str, *, seen: bool) -> str:
    """A text, or of the one that is both: what calibration sees of it, or what is held out."""
    text = read(name)
    if name != CODE:
        return text
    cut = text.index(CODE_FILE, int(len(text) * CODE_SEEN))
    return text[:cut] if seen else text[cut:]


def tokenizer(model: Subject) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.folder)


@functools.cache
def _calibration_ids(model: Subject) -> list[int]:
    ids: list[int] = tokenizer(model)(read_part(CALIBRATION_TEXTS[model.calibration], seen=True)).input_ids
    return ids


def calibration(model: Subject, samples: int, seqlen: int) -> list[dict[str, list[int]]]:
    """The model's calibration text, cut into windows."""
    ids = _calibration_ids(model)
    return [{"input_ids": ids[i * seqlen : (i + 1) * seqlen], "attention_mask": [1] * seqlen} for i in range(samples)]


def held_out(model: Subject) -> dict[str, torch.Tensor]:
    """Token ids of the held-out texts."""
    tokenize = tokenizer(model)
    return {
        name: torch.tensor(tokenize(read_part(file, seen=False)[:HELD_OUT_CHARACTERS]).input_ids)
        for name, file in HELD_OUT.items()
    }


def losses(model: Any, texts: dict[str, torch.Tensor], windows: int) -> dict[str, float]:
    """Nats per token on each text."""
    return {
        name: text_loss(model, ids, window=EVALUATION_WINDOW, max_windows=windows).nats for name, ids in texts.items()
    }


def full_precision(
    previous: dict[str, Any], model: Subject, texts: dict[str, torch.Tensor], windows: int, device: str
) -> dict[str, Any]:
    """Losses of the model as it is and where they come from, measured where ``previous`` lacks a text."""
    if set(texts) <= set(previous.get("full", ())):
        return {name: previous[name] for name in ("full", "full measured")}
    return {"full": losses(base_model(model).to(device), texts, windows), "full measured": measured(model)}


def common_texts(*losses: dict[str, float]) -> list[str]:
    """Texts that all of them were measured on: older results know fewer."""
    return [text for text in losses[0] if all(text in others for others in losses[1:])]


def device() -> str:
    """Where models are quantised and evaluated; `CUDA_VISIBLE_DEVICES=` keeps them off a GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def base_model(model: Subject) -> Any:
    """The model at full precision, bfloat16."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.bfloat16)


class Corrected(torch.nn.Module):
    """y = x Ŵᵀ + bias + (x Aᵀ) Bᵀ in bfloat16, each product rounded, as `Lora.apply` does on a kernel's output.

    Args:
        linear: a linear with Ŵ for its weight.
        lora_A: in × rank, as GPTQModel holds it.
        lora_B: rank × out.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, lora_A: torch.Tensor, lora_B: torch.Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("lora_A", lora_A)
        self.register_buffer("lora_B", lora_B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y.add_((x @ self.lora_A) @ self.lora_B)


def without_adapter(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint, the same weights, that names no adapter."""
    shutil.copytree(checkpoint, folder)
    shutil.rmtree(folder / "eora")
    path = folder / "quantize_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["adapter"]
    write_json(path, content)
    return folder


def densified(checkpoint: str | Path, base: Subject, adapter: Any = None) -> Any:
    """The full-precision architecture with Ŵ in each linear and the adapter beside it, as GPTQModel loads both.

    It computes in bfloat16 what a loaded checkpoint computes on GPTQModel's torch kernel, and is quick, since no weight
    is unpacked per call. Ŵ + BA is never formed: rounded to bfloat16 it would be another matrix than what ships. The
    plugin's fused kernels differ from this by less rounding: they add up in float32 and round y once.
    """
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    from gptqmodel_eora_ext.hosts.gptqmodel.known_weights import dequantize

    quantized = GPTQModel.load(str(checkpoint), adapter=adapter, backend=BACKEND.GPTQ_TORCH)
    dense = base_model(base)
    for name, kernel in quantized.model.named_modules():
        if not isinstance(kernel, BaseQuantLinear):
            continue
        linear = dense.get_submodule(name)
        linear.weight.data = dequantize(kernel).to(torch.bfloat16).cpu()
        # A module may have no factors: rank 0 under a budget.
        if kernel.adapter is not None and kernel.adapter.lora_A is not None:
            factors = (one.to(torch.bfloat16).cpu() for one in (kernel.adapter.lora_A, kernel.adapter.lora_B))
            dense.set_submodule(name, Corrected(linear, *factors))
    return dense


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="eora-benchmark-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _commit() -> str:
    """Of the tree that this file lies in, with "+" where files differ from it; results are no such difference."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){RESULTS.name}")
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{'+' if changed else ''}"


# Asked when a process begins, since that is the code it runs, however long.
COMMIT = _commit()


def environment(model: Subject | None = None) -> dict[str, Any]:
    """The model, the machine and versions."""
    names = ("gptqmodel", "torch", "transformers", "peft")
    return {
        **({"model": model.name} if model else {}),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "python": platform.python_version(),
        "gptqmodel-eora-ext": __version__,
        **{name: version(name) for name in names if find_spec(name) is not None},
    }


def measured(model: Subject | None = None) -> dict[str, Any]:
    """What every row or part of a results file carries as "measured": commit, day (UTC) and `environment`."""
    return {"commit": COMMIT, "day": datetime.now(timezone.utc).date().isoformat(), **environment(model)}


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def parts(asked: list[str] | None, general: Iterable[str], of_model: Iterable[str], model: Subject) -> list[str]:
    """Parts to measure: by default all for SmolLM2, and those that use the model for any other.

    Raises:
        SystemExit: when a part is asked for that another model has nothing to do with.
    """
    general, of_model = list(general), list(of_model)
    chosen = asked or ([*of_model] if model.suffix else [*general, *of_model])
    if model.suffix and (foreign := [part for part in chosen if part in general]):
        raise SystemExit(f"{', '.join(foreign)}: no model in it. Leave --model, --calibration and --layers out.")
    return chosen


def kept(path: Path, setup: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a results file holds, nothing where there is none; rows of another set-up than ``setup`` would not compare.

    Raises:
        SystemExit: when it holds results of another set-up.
    """
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if content and setup is not None and content["setup"] != json.loads(json.dumps(setup)):
        raise SystemExit(f"{path} holds results of another set-up, {content['setup']}, where this one is {setup}. "
                         f"Ask for the same, or move the file away.")  # fmt: skip
    return content


def keep(path: Path, result: dict[str, Any], *, as_json: bool = False) -> None:
    """Write a result, and print it. What it took from the file as it was keeps its own "measured"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    if as_json:
        print(json.dumps(result, indent=2))


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
