"""EoRA for GPTQModel: training-free low-rank compensation of quantised language models.

The public names are imported on first use, so that the autoload entry point costs `import torch` almost nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hosts.autoround.config import EoRAConfig
    from .hosts.gptqmodel.adapter import EoRA
    from .hosts.peft import AdapterError
    from .hosts.peft_model import load_peft
    from .plan import Plan

__version__ = "0.1.0"
__all__ = ["AdapterError", "EoRA", "EoRAConfig", "Plan", "__version__", "load_peft"]

_HOMES = {
    "AdapterError": "hosts.peft",
    "EoRA": "hosts.gptqmodel.adapter",
    "EoRAConfig": "hosts.autoround.config",
    "Plan": "plan",
    "load_peft": "hosts.peft_model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name == "EoRA":
        # Without the autoload, `model.quantize` would be looked up before the `EoRA(…)` among its arguments is made.
        import_module(".hosts.gptqmodel.seams", __name__).install_or_log()
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
