"""Processors for weights that are known without calibration: a finished checkpoint's, and round-to-nearest.

Both run in GPTQModel's calibrated loop, so that `Compensation` sees the inputs of what is compensated so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from gptqmodel.looper.loop_processor import ExecutionConfig, LoopProcessor
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.looper.weight_only_processor import WeightOnlyProcessor
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization.config import clone_weight_only_config_for_module

from ...adapter.folder import AdapterFolder
from ...adapter.layers import oriented
from ...solve import Moment


class CalibratedProcessor(LoopProcessor):
    """Base of processors that need no statistics themselves, but are to see calibration data for compensation."""

    def __init__(self, **calibration: Any) -> None:
        LoopProcessor.__init__(
            self,
            **calibration,
            execution_config=ExecutionConfig(
                require_fwd=True, fwd_replay_after_process=True, subset_forward_early_stop=True
            ),
        )

    def preprocess(self, module: NamedModule, **kwargs: Any) -> None:
        """Nothing to prepare per module."""

    def pre_process_fwd_hook(self, name: str) -> Callable[..., None]:
        return lambda module, inputs, output: None

    def has_captured_input_ids(self, name: str) -> bool:
        """Every module has its weights, with or without calibration."""
        return True

    def verify_calibration_dataset(self, processor_index: int) -> bool:
        return True


def let_go(module: NamedModule) -> None:
    """Free a module's weight once its layer has been run for the last time; whole models need not fit in memory."""
    let_go_of_weight(module.module)


def let_go_of_weight(linear: Any) -> None:
    """Free a linear module's weight, which is then on the meta device."""
    linear.weight = torch.nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)


class CheckpointProcessor(CalibratedProcessor):
    """Takes each module's Ŵ from a quantised checkpoint.

    Args:
        quantized: full module name → what gives Ŵ (out × in) for W; a module that is kept in 16 bits is not in it.
        calibration: what `LoopProcessor` takes.
    """

    def __init__(self, quantized: Mapping[str, Callable[[torch.Tensor], torch.Tensor]], **calibration: Any) -> None:
        super().__init__(**calibration)
        self.quantized = quantized

    def is_skipped(self, module: NamedModule) -> bool:
        """A module that the checkpoint keeps in 16 bits needs no compensation."""
        return module.full_name not in self.quantized

    def quantized_weight(self, module: NamedModule) -> torch.Tensor:
        """Ŵ, out × in, in the dtype that it is known in."""
        return self.quantized[module.full_name](oriented(module.module, module.module.weight.data))

    def approximation(self, name: str, weight: torch.Tensor, second_moment: Moment) -> torch.Tensor:
        """Ŵ of a module by its full name, out × in, float32, on the device of W; W where the checkpoint keeps that."""
        known = self.quantized.get(name)
        # A kernel lies where the checkpoint was loaded to, which may be another device.
        return (weight if known is None else known(weight)).to(device=weight.device, dtype=torch.float32)

    def process(self, module: NamedModule, **kwargs: Any) -> None:
        linear = module.module
        weight = self.quantized_weight(module)
        if isinstance(linear, transformers.Conv1D):
            weight = weight.T
        linear.weight.data = weight.to(device=linear.weight.device, dtype=linear.weight.dtype)

    def submodule_finalize(self, module: NamedModule, model: Any, **kwargs: Any) -> None:
        """Nothing to pack: the checkpoint stays as it is. The weight is not needed any more."""
        let_go(module)

    @classmethod
    def name(cls) -> str:
        return "eora-checkpoint"


def known_kernels(
    kernels: Mapping[str, BaseQuantLinear], over: AdapterFolder | None = None
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Quantised linears by full module name, as `CheckpointProcessor` takes them.

    Args:
        kernels: full module name → linear.
        over: an adapter that counts as a part of the weights: Ŵ + B A, float32, in place of Ŵ.

    Raises:
        AdapterError: for an adapter of other modules.
    """
    stored = {} if over is None else over.match(kernels)

    def weight_of(name: str, kernel: BaseQuantLinear) -> Callable[[torch.Tensor], torch.Tensor]:
        if over is None or name not in stored:
            return lambda weight: dequantize(kernel)

        def corrected(weight: torch.Tensor) -> torch.Tensor:
            _, factors = next(over.factors([stored[name]]))
            quantized = dequantize(kernel).to(torch.float32)
            return torch.addmm(quantized, factors.lora_B.to(quantized), factors.lora_A.to(quantized))

        return corrected

    return {name: weight_of(name, kernel) for name, kernel in kernels.items()}


def dequantize(kernel: BaseQuantLinear) -> torch.Tensor:
    """Return a quantised linear's weight, out × in, in the kernel's own dtype and rounding.

    A kernel without `dequantize_weight` is asked for its output on one-hot rows, which is exact: every sum has one
    term.
    """
    with torch.inference_mode():
        if hasattr(kernel, "dequantize_weight"):
            return kernel.dequantize_weight().T.contiguous()
        device = kernel.runtime_device()
        # QQQ's kernel keeps its scales by other names, and takes float16.
        dtype = kernel.scales.dtype if hasattr(kernel, "scales") else torch.float16
        identity = torch.eye(kernel.in_features, dtype=dtype, device=device)
        adapter, kernel.adapter = kernel.adapter, None
        bias, kernel.bias = kernel.bias, None
        try:
            return kernel(identity).T.contiguous()
        finally:
            kernel.adapter, kernel.bias = adapter, bias


class RTNProcessor(CalibratedProcessor, WeightOnlyProcessor):
    """GPTQModel's round-to-nearest, driven by calibration data that only the adapter reads."""

    def process(self, module: NamedModule, **kwargs: Any) -> None:
        self.quantize_module(module, device=None)

    def submodule_finalize(self, module: NamedModule, model: Any, **kwargs: Any) -> None:
        module.module.weight.data = module.module.weight.data.to(torch.device("cpu"))
        qcfg = clone_weight_only_config_for_module(self.qcfg, module.full_name)
        WeightOnlyProcessor.submodule_finalize(self, module, model, qcfg=qcfg)

    @classmethod
    def name(cls) -> str:
        return "rtn"
