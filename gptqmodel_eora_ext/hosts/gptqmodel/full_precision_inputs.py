"""What every module reads in the full-precision model, for the objective "output"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gptqmodel.looper.loop_processor import LoopProcessor
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.looper.native_processor import NativeProcessor


class FullPrecisionInputs(NativeProcessor):
    """Runs each layer at full precision before it is quantised, and keeps its modules' inputs until it is.

    In memory at a time: one layer's inputs of all calibration tokens, on the CPU, in the model's dtype.

    Args:
        quantizer: the processor that quantises; this one runs on the same batches.
    """

    def __init__(self, quantizer: LoopProcessor) -> None:
        super().__init__(
            tokenizer=quantizer.tokenizer,
            qcfg=quantizer.qcfg,
            calibration=quantizer.calibration_dataset,
            prepare_dataset_func=lambda calibration_dataset, **_: calibration_dataset,
            calibration_concat_size=None,
            calibration_sort=None,
            batch_size=1,
        )
        self._kept: dict[str, dict[int | None, torch.Tensor]] = {}

    def of(self, name: str, batch: int | None) -> torch.Tensor | None:
        """Input of a module of the current layer in a batch, or None where it got none."""
        return self._kept.get(name, {}).get(batch)

    def preprocess(self, module: NamedModule, **kwargs: Any) -> None:
        self._kept[module.name] = {}

    def pre_process_fwd_hook(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            self._kept[name][self.current_batch_index()] = inputs[0].detach().cpu()

        return hook

    def process(self, module: NamedModule, **kwargs: Any) -> None:
        """Nothing to do here. The inputs stay until those of the next layer replace them."""

    def submodule_finalize(self, module: NamedModule, model: Any, **kwargs: Any) -> None:
        """Nothing to finish."""

    def finalize(self, model: Any, **kwargs: Any) -> None:
        self._kept.clear()
        super().finalize(model, **kwargs)

    def name(self) -> str:
        return "eora-native"
