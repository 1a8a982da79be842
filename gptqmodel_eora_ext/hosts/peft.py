"""An adapter over a model that transformers loaded with AutoRound's own inference kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..adapter.errors import AdapterError
from ..adapter.folder import AdapterFolder

# The package that AutoRound's kernels live in.
KERNELS = "auto_round_extension."


def load_peft(model: torch.nn.Module, path: str | Path) -> Any:
    """Put an adapter on a model by PEFT, which knows GPTQModel's kernels but not AutoRound's own.

    Models with other kernels work too.

    Args:
        model: as transformers gives it.
        path: the adapter's folder, its factors in 16 or 32 bits.

    Returns:
        The `PeftModel`; it keeps the factors in float32 and adds (x Aᵀ) Bᵀ to what each kernel gives.

    Raises:
        AdapterError: for a folder that is no adapter, one with values that cannot be, or one of packed factors, which
            PEFT cannot hold.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("out", dtype="auto")
        >>> model = load_peft(model, "out/eora")
    """
    import peft
    from peft.tuners.lora.gptq import GPTQLoraLinear

    folder = AdapterFolder.open(path)
    if folder.is_packed:
        raise AdapterError(
            f"Adapter: `{path}` has factors in {folder.factor_bits} bits, which PEFT cannot hold. Make a plain copy: "
            f"eora export {path} --peft FOLDER"
        )
    config = peft.PeftConfig.from_pretrained(str(folder.path))
    kernels = {type(module) for module in model.modules() if type(module).__module__.startswith(KERNELS)}
    if kernels:
        # PEFT's way for layers it does not know. Its layer for GPTQ kernels adds the product to whatever they give.
        config._register_custom_module(dict.fromkeys(kernels, GPTQLoraLinear))
    return peft.PeftModel.from_pretrained(model, str(folder.path), config=config)
