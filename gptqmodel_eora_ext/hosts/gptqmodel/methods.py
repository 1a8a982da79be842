"""What GPTQModel can quantise a model to, and which of it an adapter can be made for: one table, for code and docs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptqmodel.quantization.config import METHOD
from gptqmodel.utils.backend import BACKEND


@dataclass(frozen=True)
class Service:
    """How adapters for a method are made.

    Attributes:
        in_loop: whether while the model is quantised.
        backend: what loads a finished checkpoint so that it can be dequantised on any device; None where none is
            served.
        reason: what stands against the one that is not served, and what works in its place; empty where both are.
    """

    in_loop: bool
    backend: BACKEND | None
    reason: str = ""


_WITHOUT_DATA = (
    "GPTQModel quantises to it without running the model, so nothing is known of the inputs; quantise without an "
    "adapter, then make one for the finished checkpoint (`eora generate`)"
)
_OF_ITS_OWN = (
    "GPTQModel has a loop step of its own for it, which compensation is not built into; quantise without an adapter, "
    "then make one for the finished checkpoint (`eora generate`)"
)
SERVICES: Mapping[METHOD, Service] = {
    METHOD.GPTQ: Service(True, BACKEND.GPTQ_TORCH),
    METHOD.AWQ: Service(True, BACKEND.AWQ_TORCH),
    METHOD.QQQ: Service(True, BACKEND.QQQ_TORCH),
    METHOD.FP8: Service(False, BACKEND.FP8_TORCH, _WITHOUT_DATA),
    METHOD.GGUF: Service(False, BACKEND.GGUF_TORCH, _WITHOUT_DATA),
    METHOD.PARO: Service(False, BACKEND.AUTO, _OF_ITS_OWN),
    METHOD.VPTQ: Service(False, BACKEND.VPTQ_TORCH, _OF_ITS_OWN),
    METHOD.BITSANDBYTES: Service(
        False,
        None,
        "GPTQModel's kernel for it takes no adapter; quantise by transformers' `BitsAndBytesConfig`, and make an "
        "adapter for that checkpoint (`eora generate`)",
    ),
    METHOD.EXL3: Service(
        False, None, "it needs a GPU to quantise, and its kernels take no adapter; quantise by GPTQ or AWQ instead"
    ),
}
# An option of GPTQ, no method of its own.
ROTATION = (
    "`rotation` turns the model's weights before they are quantised, by kernels that need a GPU, and an adapter for "
    "turned weights was never tried; quantise without `rotation`"
)


def not_in_loop(method: METHOD) -> str | None:
    """Why no adapter is made while a model is quantised by ``method``; None where one is."""
    service = SERVICES.get(method)
    if service is None:
        return f"this version of the plugin does not know `{method}`"
    return None if service.in_loop else service.reason


def finished_backend(method: METHOD) -> BACKEND | str:
    """What loads a finished checkpoint of ``method``; the reason where none is served."""
    service = SERVICES.get(method)
    if service is None:
        return f"this version of the plugin does not know `{method}`"
    return service.reason if service.backend is None else service.backend


def table() -> list[tuple[str, str, str, str]]:
    """Rows for the docs: method, in the loop, finished checkpoint, and why not."""
    yes, no = "yes", "no"
    rows = [
        (f"`{method.value}`", yes if one.in_loop else no, yes if one.backend else no, one.reason)
        for method, one in SERVICES.items()
    ]
    return [*rows, ("GPTQ with `rotation`", no, no, ROTATION)]
