"""Pruning inside GPTQModel's layer loop: a module is pruned by the inputs that the compensated model gives it."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from gptqmodel.looper.named_module import NamedModule

from ...adapter.factors import ModuleFactors
from ...adapter.layers import is_linear, oriented
from ...capture import SecondMoment
from ...formats.sparsity import Pattern
from ...loop.changed_weights import ChangedWeights
from ...solve import MAGNITUDE, Moment, prune
from .compensation import Compensation
from .known_weights import CalibratedProcessor, let_go
from .rounds import best_round

log = logging.getLogger(__name__)


class PruningProcessor(CalibratedProcessor):
    """Prunes the modules of the loop; `PruningCompensation`, which is mixed in, gives it what it prunes by.

    Args:
        method: one of `solve.METHODS`.
        pattern: of the zeros.
        changed: keeps the pruned weights until the files are written.
        calibration: what `LoopProcessor` takes.
    """

    def __init__(self, method: str, pattern: Pattern, changed: ChangedWeights, **calibration: Any) -> None:
        super().__init__(**calibration)
        self.method = method
        self.pattern = pattern
        self.changed = changed

    def is_skipped(self, module: NamedModule) -> bool:
        """What `dynamic` leaves out stays as it is."""
        return self.qcfg.dynamic_get(module.full_name) is False

    def approximation(self, name: str, weight: torch.Tensor, second_moment: Moment) -> torch.Tensor:
        """Ŵ of a module by its full name, out × in, float32, for forecasts."""
        return prune(weight, second_moment, self.pattern, self.method)

    def pruned(self, module: NamedModule, weight: torch.Tensor, moment: SecondMoment) -> torch.Tensor:
        """Ŵ as the module holds it, in its dtype; ``weight`` likewise, float32.

        An expert that no token reached is pruned by the size of its weights, since nothing is known of its inputs.
        """
        linear = module.module
        method = self.method
        if not moment.tokens and method != MAGNITUDE:
            log.warning("%s: no calibration token reached it; it is pruned by magnitude.", module.full_name)
            method = MAGNITUDE
        found = prune(oriented(linear, weight), moment.mean(weight.device), self.pattern, method)
        return oriented(linear, found).to(linear.weight.dtype).contiguous()

    def submodule_finalize(self, module: NamedModule, model: Any, **kwargs: Any) -> None:
        """Keep Ŵ, which is in place again, for the files; it need not stay in memory."""
        with self.lock:
            self.changed.keep(f"{module.full_name}.weight", module.module.weight.data)
        let_go(module)

    @classmethod
    def name(cls) -> str:
        return "eora-prune"


class PruningCompensation(Compensation):
    """Mixin for `PruningProcessor`: prunes a module by the second moment of its inputs, and compensates by the same."""

    pruned: Any

    def process(self, module: NamedModule, *args: Any, **kwargs: Any) -> None:
        linear = module.module
        if module.name not in self._modules or not is_linear(linear):
            log.warning("%s: linear layers are pruned, not %s; it stays as it is.",
                        module.full_name, type(linear).__name__)  # fmt: skip
            return
        weight = linear.weight.data
        moment = self._moment(module.name)

        def approximate(factors: ModuleFactors | None) -> torch.Tensor:
            wide = weight.to(torch.float32)
            if factors is not None:
                update = factors.lora_B.to(torch.float32) @ factors.lora_A.to(torch.float32)
                wide = wide - oriented(linear, update).to(wide.device)
            return self.pruned(module, wide, moment)  # type: ignore[no-any-return]

        solve = functools.partial(self._solve, module, weight, moment)
        pruned, factors = best_round(self.run.rounds, approximate, solve)
        linear.weight.data = pruned
        self._apply(module, factors)
