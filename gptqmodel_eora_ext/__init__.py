"""EoRA for GPTQModel: training-free low-rank compensation of quantised language models.

The public names are imported on first use, and `typing` not at all: Python imports this file at the start of every
process of an environment that has the plugin (`autoload`).
"""

from __future__ import annotations

from ._version import __version__
from .system.moved import find_under_former_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .adapter.errors import AdapterError
    from .hosts.autoround.config import EoRAConfig
    from .hosts.ensemble import ensemble_of
    from .hosts.gptqmodel.adapter import EoRA
    from .hosts.peft import load_peft
    from .hosts.prune import prune
    from .hosts.recipes import prepare_recipe, run_recipe
    from .hosts.refine import refine_checkpoint
    from .plan import Plan

__all__ = [
    "AdapterError", "EoRA", "EoRAConfig", "Plan", "__version__", "ensemble_of", "load_peft", "prepare_recipe", "prune",
    "refine_checkpoint", "run_recipe",
]  # fmt: skip

_HOMES = {
    "AdapterError": "adapter.errors",
    "EoRA": "hosts.gptqmodel.adapter",
    "EoRAConfig": "hosts.autoround.config",
    "Plan": "plan",
    "ensemble_of": "hosts.ensemble",
    "load_peft": "hosts.peft",
    "prepare_recipe": "hosts.recipes",
    "prune": "hosts.prune",
    "refine_checkpoint": "hosts.refine",
    "run_recipe": "hosts.recipes",
}
# Modules that users of version 0.1.0 may have imported by name.
find_under_former_names(
    __name__,
    {
        "compensate": "adapter.compensate",
        "kernel_report": "evaluate.kernel_report",
        "presets": "adapter.presets",
        "study": "evaluate.study",
        "summary": "adapter.summary",
    },
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name == "EoRA":
        # Without the autoload, `model.quantize` would be looked up before the `EoRA(…)` among its arguments is made.
        import_module(".hosts.gptqmodel.seams", __name__).install_or_log()
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
