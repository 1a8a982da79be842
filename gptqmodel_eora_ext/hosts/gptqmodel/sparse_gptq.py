"""SparseGPT's joint form in the place of GPTQ: a module is pruned and quantised at once, and packed by GPTQModel."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from gptqmodel.quantization.gptq import GPTQ

from ...formats.sparsity import Pattern
from ...solve import Grid, Moment, sparsegpt_codes, weighted_energy
from .grids import module_grid


def forecast_jointly(
    config: Any, pattern: Pattern, name: str, weight: torch.Tensor, second_moment: Moment
) -> torch.Tensor:
    """Ŵ of a module as `prune_jointly` will make it, for forecasts under a budget.

    Args:
        config: GPTQModel's `QuantizeConfig`.
        pattern: of the zeros.
        name: full module name.
        weight: W, out × in.
        second_moment: C.
    """
    bits = config.dynamic_get(name, "bits", config.bits)
    return sparsegpt_codes(weight, second_moment, pattern, bits, module_grid(config, name)).weight


def prune_jointly(task: GPTQ, pattern: Pattern) -> None:
    """Have a module's task prune as it quantises. The zeros are exact: the code that stands for 0 is one of the grid's.

    Columns keep their order, since groups of a pattern are neighbours. A module that no token reached is pruned by the
    size of its weights, and rounded to nearest.

    Args:
        task: its `quantize` is replaced; the Hessian and the weight are read from it as the host's own does.
        pattern: of the zeros.
    """

    def quantize(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        start = time.time()
        given = getattr(task, "module_copy", None)
        weight = given if given is not None else task.clone_module()
        task.module_copy = None
        hessian = task.H if task.nsamples else None
        moment = hessian if hessian is not None else torch.ones(weight.shape[1], device=weight.device)
        config = task.qcfg
        grid = Grid(config.group_size, bool(config.sym), float(config.mse or 0.0))
        found = sparsegpt_codes(weight, moment, pattern, config.bits, grid)
        loss = weighted_energy(weight.to(torch.float32) - found.weight, hessian) if hessian is not None else 0.0
        task.H = None
        size = weight.shape[1] if config.group_size == -1 else config.group_size
        groups = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device) // size
        linear = task.module
        rounded = found.weight.T if isinstance(linear, transformers.Conv1D) else found.weight
        # The host's own returns them so: weight, scales, zeros, groups, seconds, loss, damping, samples.
        return (rounded.to(linear.weight.dtype).contiguous(), found.scales, found.zeros, groups, time.time() - start,
                loss, 0.0, task.nsamples)  # fmt: skip

    task.quantize = quantize
