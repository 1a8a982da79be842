"""A checkpoint of any format that transformers loads, with adapters that PEFT puts on and takes off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...adapter.folder import AdapterFolder
from ...adapter.save import export_peft
from ..jobs import Loaded
from ..peft import load_peft


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
    )
    if adapter is not None:
        model = put_on(model, adapter)
    return Loaded(model.eval(), partial(with_adapter, model))


def put_on(model: Any, adapter: Path) -> Any:
    """A `PeftModel` with an adapter; packed factors are unpacked first, since PEFT cannot hold them."""
    import tempfile

    folder = AdapterFolder.open(adapter)
    if not folder.is_packed:
        return load_peft(model, adapter)
    with tempfile.TemporaryDirectory(prefix="eora-plain-") as scratch:
        plain = Path(scratch) / "plain"
        export_peft(folder, plain)
        return load_peft(model, plain)


@contextmanager
def with_adapter(model: Any, adapter: Path | None) -> Iterator[None]:
    """See `Loaded.with_adapter`."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if adapter is None:
        if base is model:
            yield
            return
        with model.disable_adapter():
            yield
        return
    if base is not model:
        raise NotImplementedError(
            f"EoRA: a model that was loaded with an adapter by PEFT takes no other one over it (`{adapter}`). Load the "
            f"checkpoint without an adapter."
        )
    put = put_on(model, adapter)
    try:
        yield
    finally:
        put.unload()
