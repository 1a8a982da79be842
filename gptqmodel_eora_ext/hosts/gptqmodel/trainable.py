"""GPTQModel's quantised modules as `refine` takes them: Ŵᵀ on demand, from whichever kernel holds the weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear import BaseQuantLinear

from ...kernels.triton import runs_on
from ...refine import FrozenWeight, Trainee
from .adapter import EoRA
from .checkpoint.load import uncompiled
from .fused import EoRAFusedLinear
from .known_weights import dequantize
from .triton import EoRATritonLinear


class KernelWeight(FrozenWeight):
    """The weight of a quantised linear.

    Args:
        kernel: GPTQModel's module, of any kernel that dequantises or multiplies.
    """

    def __init__(self, kernel: BaseQuantLinear) -> None:
        self._kernel = kernel
        self._stacked = stacked(kernel)
        self.in_features, self.out_features, self.bias = kernel.in_features, kernel.out_features, kernel.bias

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """See `FrozenWeight`: the plugin's CPU or Triton kernel dequantises, elsewhere the host's own torch code."""
        with torch.no_grad():
            if self._stacked is not None:
                return next(self._stacked.dense(dtype))
            if isinstance(self._kernel, EoRAFusedLinear) and self._kernel.served_on_cpu:
                return self._kernel.dense(dtype)
            # Tensors made in inference mode cannot be saved for a gradient, so this is a copy.
            return dequantize(self._kernel).to(dtype, copy=True).T


def stacked(kernel: BaseQuantLinear) -> Any:
    """What the Triton kernels read of a module that they serve where it lies; None for another."""
    if not isinstance(kernel, EoRATritonLinear) or not runs_on(kernel.runtime_device()):
        return None
    from ...kernels.triton.ops import StackedLinears

    return StackedLinears.prepare([kernel.packed()], [None], [None])


def open_trainee(checkpoint: Path, *, trust_remote_code: bool = False, device: str | None = None) -> Trainee:
    """A finished checkpoint without its adapter, to train another one for it.

    Args:
        checkpoint: its folder.
        trust_remote_code: whether model code that comes with it may run.
        device: "cpu", "cuda" or "cuda:0"; None leaves it to GPTQModel.

    Raises:
        ValueError: for a checkpoint without a quantised linear layer.
        NotImplementedError: for modules that rotate their input.
    """
    from gptqmodel import GPTQModel

    given: dict[str, Any] = {} if device is None else {"device": device}
    with uncompiled():
        loaded = GPTQModel.load(str(checkpoint), adapter=EoRA(), trust_remote_code=trust_remote_code, **given)
    return trainee_of(loaded.model, str(checkpoint))


def trainee_of(model: Any, named: str) -> Trainee:
    """A model of GPTQModel's kernels.

    Args:
        model: transformers' model with GPTQModel's modules.
        named: what to call it in messages.

    Raises:
        ValueError: when it has no quantised linear layer.
        NotImplementedError: for modules that rotate their input.
    """
    kernels = {name: one for name, one in model.named_modules() if isinstance(one, BaseQuantLinear)}
    if not kernels:
        raise ValueError(f"EoRA: `{named}` holds no quantised linear layer. Is it a quantised checkpoint?")
    for name, kernel in kernels.items():
        if getattr(kernel, "online_full_had", False) or getattr(kernel, "online_partial_had", False):
            raise NotImplementedError(
                f"EoRA: {name} of `{named}` rotates its input, which refinement does not compute. Quantise without "
                f"rotation to refine."
            )
    return Trainee(model, {name: KernelWeight(kernel) for name, kernel in kernels.items()})
