"""The kernel class for CUDA and ROCm: packed weights and an `EoRA` adapter, in two launches for all modules that read
the same input.

Results were checked on an H100 and under Triton's interpreter, the selection with GPTQModel's own selector.
"""

# ruff: noqa: RUF012 (what a kernel supports is said in lists, which the host extends)

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gptqmodel.adapter.adapter import Lora
from gptqmodel.models._const import DEVICE, PLATFORM
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.utils.backend import BACKEND

from ...formats.packed_weights import WEIGHT_BITS
from ...kernels.dispatch import ALL, DTYPES, SWITCH, TRITON, switched_off
from ...kernels.shared_input import Joint
from ...kernels.triton import available, runs_on
from ...kernels.versions import versions
from .adapter import EoRA
from .fused import PACKED, EoRAFusedLinear, mixture_of


class EoRATritonLinear(EoRAFusedLinear):
    """GPTQ weights and an `EoRA` adapter in one pass on a GPU; on another device, what `EoRAFusedLinear` does.

    Weights stay as the checkpoint has them; nothing is repacked or copied but the factors A, which are stacked.
    """

    # The host looks for these attributes in the class itself and not in its bases, so all of them stand here again.
    SUPPORTS_BACKENDS = [BACKEND.GPTQ_TRITON]
    SUPPORTS_BACKEND_SELECTION = False
    SUPPORTS_RAW_PACKING = False
    SUPPORTS_METHODS = [METHOD.GPTQ]
    SUPPORTS_FORMATS = {FORMAT.GPTQ: 1, FORMAT.GPTQ_V2: 1}
    SUPPORTS_BITS = list(WEIGHT_BITS)
    SUPPORTS_GROUP_SIZE = [-1, 16, 32, 64, 128, 256, 512, 1024]
    SUPPORTS_DESC_ACT = [True, False]
    SUPPORTS_SYM = [True, False]
    SUPPORTS_SHARDS = True
    SUPPORTS_TRAINING = True
    SUPPORTS_AUTO_PADDING = True
    SUPPORTS_IN_FEATURES_DIVISIBLE_BY = [1]
    SUPPORTS_OUT_FEATURES_DIVISIBLE_BY = [1]
    SUPPORTS_DEVICES = [DEVICE.CUDA, DEVICE.ROCM]
    SUPPORTS_PLATFORM = [PLATFORM.LINUX, PLATFORM.WIN32]
    SUPPORTS_PACK_DTYPES = [torch.int32]
    SUPPORTS_ADAPTERS = [Lora]
    SUPPORTS_DTYPES = list(DTYPES)
    REQUIRES_FORMAT_V2 = True
    QUANT_TYPE = "eora_triton"

    @classmethod
    def validate(cls, *args: Any, adapter: Any = None, **kwargs: Any) -> tuple[bool, Exception | None]:
        """Whether this class can serve a module; the reason where it cannot."""
        if TRITON in switched_off():
            return False, NotImplementedError(f"{cls.__name__} is switched off by {SWITCH}={TRITON}.")
        return super().validate(*args, adapter=adapter, **kwargs)

    @classmethod
    def validate_once(cls) -> tuple[bool, Exception | None]:
        return (True, None) if available() else (False, ImportError(f"{cls.__name__}: Triton is not installed."))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(self, x) if self._launchable(x) else super().forward(x)

    def _launchable(self, x: torch.Tensor) -> bool:
        return (
            runs_on(x.device)
            and self.runtime_device() == x.device
            and x.dtype in DTYPES
            and x.shape[-1] == self.in_features
            and not (self.online_full_had or self.online_partial_had)
            and not self._off & {ALL, TRITON}
            and not (
                torch.is_grad_enabled() and (x.requires_grad or (self.adapter is not None and self.adapter.trained))
            )
        )

    @property
    def joinable(self) -> bool:
        """As `SharesInput.joinable`."""
        return runs_on(self.runtime_device()) or super().joinable

    @property
    def _gives_up(self) -> bool:
        """As of the base class, but on a GPU the kernels read the packed tensors, which therefore stay."""
        return not runs_on(self.runtime_device())

    def state(self) -> tuple[Any, ...]:
        """As `SharesInput.state`: on a GPU, all tensors and how often they were written to."""
        if not runs_on(self.runtime_device()):
            return super().state()
        # Looked up where they lie: this runs at every call, and to ask the module for them takes longer than a launch.
        buffers = self._buffers
        bias = buffers["bias"] if "bias" in buffers else self.__dict__["bias"]
        tensors = (*map(buffers.__getitem__, PACKED), bias)
        adapter = () if self.adapter is None else self.adapter.state()
        return (*tensors, *versions(*tensors), *adapter)

    @classmethod
    def join(cls, modules: Sequence[EoRATritonLinear]) -> Joint:
        """As `SharesInput.join`: the launches, if the modules are on a GPU."""
        if not runs_on(modules[0].runtime_device()):
            return super().join(modules)
        from ...kernels.triton.ops import StackedLinears

        device = modules[0].runtime_device()
        factors = [None if module.adapter is None else module.adapter.factors(device) for module in modules]
        launches = StackedLinears.prepare(
            [module.packed() for module in modules], factors, [module.bias for module in modules]
        )
        mixture = mixture_of(modules)
        if mixture is None:
            return launches
        in_features = modules[0].in_features
        return lambda x: launches(x, mixture.now.for_rows(x.numel() // in_features, device))


def candidates(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The kernel classes that the host tries for a model's modules, in their order.

    With an explicit `BACKEND.GPTQ_TRITON` and an `EoRA`, this file's class comes first; modules that it cannot serve go
    to the host's. In the automatic order it stands already (`seams`). An `EoRA()` with nothing to load is told here,
    before modules are made with it, that it stands for the kernels alone.
    """
    asked = inspect.signature(original).bind(*args, **kwargs).arguments
    if isinstance(asked.get("adapter"), EoRA) and not asked.get("pack"):
        asked["adapter"].settle_for_loading()
    found = original(*args, **kwargs)
    explicit = asked.get("backend") == BACKEND.GPTQ_TRITON and not asked.get("pack")
    if explicit and isinstance(asked.get("adapter"), EoRA) and isinstance(found, list) and TRITON not in switched_off():
        return [EoRATritonLinear, *found]
    return found
