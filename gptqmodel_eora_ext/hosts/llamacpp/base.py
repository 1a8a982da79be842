"""A full-precision model that lies in a GGUF file, as a folder that transformers opens."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_model

from ...formats.gguf import gguf_package
from ...formats.gguf.model import FLOATING, SPLIT_COUNT, GGUFModel
from ...system.files import cache_folder, replaced_folder, write_json

log = logging.getLogger(__name__)

# What weights are unpacked to, so that no bit of them is lost; norms are stored in F32 whatever the weights are.
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
LINEAR = re.compile(r"blk\.\d+\.(attn|ffn)_.*\.weight")
ADVICE = "Name the model's Hugging Face folder in its place."


def unpacked_base(path: Path) -> str:
    """Unpack a model in F16, BF16 or F32 into a folder in the user's cache, by transformers' own reader; once.

    Unpacking has the whole model in memory, in its dtype, and leaves a folder of its size; what reads the folder
    afterwards takes a layer at a time.

    Args:
        path: the file.

    Returns:
        The folder, with the tokenizer in it.

    Raises:
        GGUFError: for a file that is broken, or holds no model.
        ValueError: for one that is quantised or split, or of an architecture that transformers does not read from GGUF.
        OSError: when the disk is full.
    """
    gguf_package()
    model = GGUFModel(path)
    dtype = _dtype(model)
    folder = cache_folder() / "gguf" / _key(path)
    if (folder / "config.json").is_file():
        return str(folder)
    log.info("EoRA: unpacking `%s` into `%s`.", path, folder)
    with replaced_folder(folder) as fresh:
        loaded = _loaded(path, dtype)
        _tokenizer(path).save_pretrained(fresh)
        # By hand: transformers takes whatever came from GGUF for quantised, and does not save it.
        config = loaded.config.to_dict()
        config.pop("quantization_config", None)
        write_json(fresh / "config.json", config)
        save_torch_model(loaded, fresh, metadata={"format": "pt"})
    return str(folder)


def _dtype(model: GGUFModel) -> torch.dtype:
    """Of the linear layers, which have to be as they were trained."""
    if (model.header.whole(SPLIT_COUNT) or 1) > 1:
        raise ValueError(
            f"EoRA: `{model.path}` is split, and transformers reads a base in GGUF from one file. Join it: "
            f"`llama-gguf-split --merge first-part.gguf whole.gguf`."
        )
    quantized = next(model.linear(), None)
    if quantized is not None:
        raise ValueError(
            f"EoRA: `{model.path}` is quantised ({quantized.name} is of type {quantized.type}), and an adapter is made "
            f"against the full-precision model. Name its F16, BF16 or F32 file first, the quantised one second."
        )
    types = {info.type for name, info in model.tensors.items() if LINEAR.fullmatch(name) and len(info.shape) > 1}
    unknown = types - set(FLOATING)
    if not types or unknown:
        raise ValueError(f"EoRA: `{model.path}` holds no linear layers that could be read. {ADVICE}")
    return DTYPES[types.pop()] if len(types) == 1 and types <= set(DTYPES) else torch.float32


def _key(path: Path) -> str:
    found = path.resolve()
    state = found.stat()
    return hashlib.sha256(f"{found} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()


def _loaded(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    except (ValueError, NotImplementedError, KeyError, RuntimeError) as error:
        raise ValueError(f"EoRA: transformers does not read `{path}` ({error}). {ADVICE}") from error


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, NotImplementedError, KeyError, TypeError) as error:
        raise ValueError(f"EoRA: transformers reads no tokenizer from `{path}` ({error}). {ADVICE}") from error
