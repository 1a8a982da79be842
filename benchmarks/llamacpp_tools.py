"""llama.cpp's programs, as `make llamacpp` has built them, for benchmarks and tests."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gptqmodel_eora_ext.system.files import cache_folder

HOME = cache_folder() / "llamacpp"
SOURCE = HOME / "source" / "vendor" / "llama.cpp"
PROGRAMS = HOME / "build" / "bin"
CONTEXT = 512
MISSING = f"llama.cpp is not built in {HOME}: run `make llamacpp`"


def is_built() -> bool:
    """Whether the programs that benchmarks run are there."""
    return all((PROGRAMS / name).is_file() for name in ("llama-quantize", "llama-perplexity", "llama-completion"))


def run(program: str, *arguments: str | Path, threads: int | None = None) -> str:
    """Run a program; what it printed, to both outputs.

    Raises:
        RuntimeError: when it fails, with the end of what it printed.
    """
    more = [] if threads is None else ["-t", str(threads)]
    command = [str(PROGRAMS / program), *map(str, arguments), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    printed = done.stdout.decode(errors="replace")
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{printed[-3000:]}")
    return printed


# The converter knows a tokenizer by what it makes of a text. A small model in a test has one that its architecture
# never had; then it is told which it is.
CONVERT_AS = """
import runpy, sys
sys.argv = sys.argv[1:]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: {name!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert(folder: Path, output: Path, kind: str = "f16", tokenizer: str | None = None) -> Path:
    """A Hugging Face folder as GGUF, by llama.cpp's converter; ``tokenizer`` names one that it would not know."""
    script = SOURCE / "convert_hf_to_gguf.py"
    told = [] if tokenizer is None else ["-c", CONVERT_AS.format(name=tokenizer)]
    command = [sys.executable, *told, str(script), str(folder), "--outfile", str(output), "--outtype", kind]
    paths = os.pathsep.join([str(SOURCE), str(SOURCE / "gguf-py"), str(HOME / "python")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr[-3000:]}")
    return output


def quantize(source: Path, output: Path, kind: str, *options: str | Path, threads: int = 2) -> Path:
    """Quantise a GGUF file."""
    run("llama-quantize", *options, source, output, kind, str(threads))
    return output


def nats(model: Path, text: Path, chunks: int, adapter: Path | None = None, threads: int = 2) -> float:
    """Mean loss a token over so many windows of 512 tokens, of each of which the second half counts."""
    with_adapter: Sequence[str | Path] = ("--lora", adapter) if adapter else ()
    printed = run(
        "llama-perplexity", "-m", model, "-f", text, "-c", str(CONTEXT), "--chunks", str(chunks), *with_adapter,
        threads=threads,
    )  # fmt: skip
    found = re.search(r"Final estimate: PPL = ([\d.]+)", printed)
    if found is None:
        raise RuntimeError(f"llama-perplexity printed no estimate:\n{printed[-2000:]}")
    return math.log(float(found[1]))


def tokens_per_second(model: Path, prompt: str, tokens: int, adapter: Path | None = None, threads: int = 1) -> float:
    """Speed of writing, from llama.cpp's own clock."""
    with_adapter: Sequence[str | Path] = ("--lora", adapter) if adapter else ()
    printed = run(
        "llama-completion", "-m", model, "-p", prompt, "-n", str(tokens), "--temp", "0", "--ignore-eos", "-no-cnv",
        "--no-warmup", "-c", str(CONTEXT), *with_adapter, threads=threads,
    )  # fmt: skip
    found = re.findall(r"eval time =.*?([\d.]+) tokens per second", printed)
    if not found:
        raise RuntimeError(f"llama-completion printed no speed:\n{printed[-2000:]}")
    # The first such line is of the prompt.
    return float(found[-1])
