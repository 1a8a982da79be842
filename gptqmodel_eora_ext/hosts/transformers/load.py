"""A checkpoint of any format that transformers loads, with adapters that are put on and taken off, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...adapter.folder import AdapterFolder
from ..jobs import Loaded


def load(
    checkpoint: Path,
    adapter: Path | None = None,
    *,
    for_adapters: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """See `Loader`."""
    from transformers import AutoModelForCausalLM

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype="auto", device_map={"": place}, trust_remote_code=trust_remote_code
    ).eval()
    own = ExitStack()
    if adapter is not None:
        own.enter_context(_added(model, adapter))
    return Loaded(model, partial(_with_adapter, model, own, adapter))


@contextmanager
def _with_adapter(model: Any, own: ExitStack, loaded: Path | None, adapter: Path | None) -> Iterator[None]:
    """See `Loaded.with_adapter`.

    Args:
        model: as transformers gives it.
        own: takes off what the model was loaded with.
        loaded: the adapter that it was loaded with.
        adapter: the one that is wanted.
    """
    own.close()
    try:
        with _added(model, adapter) if adapter is not None else ExitStack():
            yield
    finally:
        if loaded is not None:
            own.enter_context(_added(model, loaded))


@contextmanager
def _added(model: Any, adapter: Path) -> Iterator[None]:
    """Have each module add (x Aᵀ) Bᵀ to what it gives, in float32 as PEFT does.

    PEFT itself replaces modules, which not all formats outlive: bitsandbytes' 4-bit layers give other numbers once they
    have run on a CPU and are then replaced (0.50.2 with PEFT 0.21.2).

    Raises:
        AdapterError: for an adapter of another model.
    """
    folder = AdapterFolder.open(adapter)
    stored = folder.match([name for name, _ in model.named_modules()])
    names = {file_name: name for name, file_name in stored.items()}
    handles = []
    try:
        for file_name, factors in folder.factors(list(names)):
            module = model.get_submodule(names[file_name])
            device = next((one.device for one in (*module.parameters(), *module.buffers())), torch.device("cpu"))
            lora_A, lora_B = (one.to(device, torch.float32) for one in (factors.lora_A, factors.lora_B))
            handles.append(module.register_forward_hook(partial(_add, lora_A, lora_B)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(
    lora_A: torch.Tensor, lora_B: torch.Tensor, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any
) -> Any:
    update = (inputs[0].to(torch.float32) @ lora_A.T) @ lora_B.T
    return (output + update).to(output.dtype)
