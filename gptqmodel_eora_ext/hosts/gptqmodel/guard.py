"""Errors of worker threads, brought to the main thread: GPTQModel's workers end the whole process at any exception.

A worker remembers the first error in the run and returns as if it were done. `CompensatingLooper` raises it on the main
thread at the next event of the loop: after the subset under way, before anything is packed or run with its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gptqmodel.looper.named_module import NamedModule

from .run import CompensationRun


class Guarded:
    """Outermost mixin of a processor that compensates."""

    run: CompensationRun
    _modules: dict[str, NamedModule]

    def process(self, module: NamedModule, *args: Any, **kwargs: Any) -> None:
        """Quantise and compensate. After an error nothing more is begun."""
        if self.run.failure is None:
            with self.run.guarded(module.full_name):
                super().process(module, *args, **kwargs)  # type: ignore[misc]

    def pre_process_fwd_hook(self, name: str) -> Callable[..., None]:
        """The hook that sums a module's inputs; with several GPUs, workers run forwards too."""
        hook = super().pre_process_fwd_hook(name)  # type: ignore[misc]
        full_name = self._modules[name].full_name if name in self._modules else name

        def guarded(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            with self.run.guarded(full_name):
                hook(module, inputs, output)

        return guarded

    def submodule_finalize(self, module: NamedModule, *args: Any, **kwargs: Any) -> None:
        """Pack the module; an error is remembered."""
        with self.run.guarded(module.full_name):
            super().submodule_finalize(module, *args, **kwargs)  # type: ignore[misc]
