"""`EoRA(rounds=n)`: weight and adapter chosen for each other, by GPTQModel's own GPTQ.

GPTQ rounds W, and the adapter takes up the strongest part of the error. What the adapter takes up need not be in the
quantised weight. So in the next round GPTQ rounds W − BA, with the same Hessian, and the adapter is solved for again,
for what is left. Each round starts from the last one's factors; the first round that leaves no less of the error is the
last. With GPTQModel's search for scales (`mse`) a round takes a few percent off the error. Without it, none does in
SmolLM2's first layer at 2 bits (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from gptqmodel.quantization.gptq import GPTQ

from ...adapter.factors import ModuleFactors

Solve = Callable[[torch.Tensor, bool], ModuleFactors]
T = TypeVar("T")


def best_round(
    rounds: int, approximate: Callable[[ModuleFactors | None], T], solve: Callable[[T, bool], ModuleFactors]
) -> tuple[T, ModuleFactors]:
    """Approximate W, then W − BA with the last round's factors, until a round leaves no less of the error.

    Args:
        rounds: at most so many.
        approximate: Ŵ of W less the update of these factors; of W where there are none.
        solve: factors for what `approximate` gave; its second argument tells whether it is the first round.

    Returns:
        Ŵ and factors of the best round.
    """
    kept = approximate(None)
    factors = solve(kept, True)
    for _ in range(rounds - 1 if factors.rank else 0):
        found = approximate(factors)
        latest = solve(found, False)
        if _error(latest) >= _error(factors):
            break
        kept, factors = found, latest
    return kept, factors


class JointRounds:
    """Takes the place of `quantize` of one module's `GPTQ` task, and calls it once for each round.

    Args:
        task: the module's task; the module's weight is W until the host has taken the result.
        rounds: times to quantise, at least 2.
        solve: factors for a Ŵ; its second argument tells whether it is the first round.

    Attributes:
        factors: of the round that was kept, once `quantize` has returned.
    """

    def __init__(self, task: GPTQ, rounds: int, solve: Solve) -> None:
        self.factors: ModuleFactors | None = None
        self._task = task
        self._rounds = rounds
        self._solve = solve
        self._original = task.quantize
        task.quantize = self.quantize

    def quantize(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What `GPTQ.quantize` returns, of the best round."""
        task = self._task
        # GPTQ calls its `quantize` again where a loss is not a number; that call must not start rounds of its own.
        task.quantize = self._original
        hessian = None if task.H is None else task.H.clone()
        weight = task.clone_module()

        def approximate(factors: ModuleFactors | None) -> tuple[Any, ...]:
            if factors is not None:
                task.H = hessian.clone()  # type: ignore[union-attr]
                # GPTQ shares the Hessian's inverse among modules that read one input. The first round has used it up.
                task.clear_shared_hessian_cache()
                task.module_copy = weight - self._update(factors, weight)
            return self._original(*args, **kwargs)

        # Without a Hessian the host has fallen back to plain rounding, which reads W, so a round would change nothing.
        rounds = self._rounds if hessian is not None else 1
        kept, self.factors = best_round(rounds, approximate, lambda found, first: self._solve(found[0], first))
        return kept

    def _update(self, factors: ModuleFactors, weight: torch.Tensor) -> torch.Tensor:
        """B A as GPTQ holds weights: out × columns, padded columns last."""
        update = factors.lora_B.to(torch.float32) @ factors.lora_A.to(torch.float32)
        return torch.nn.functional.pad(update.to(weight.device), (0, weight.shape[1] - update.shape[1]))


def _error(factors: ModuleFactors) -> float:
    """The error that is left; known, as of all factors that were just computed."""
    assert factors.error_after is not None
    return factors.error_after
