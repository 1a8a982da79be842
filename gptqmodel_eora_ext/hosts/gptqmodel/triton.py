"""The kernel class for CUDA and ROCm: packed weights and an `EoRA` adapter, two launches for all that reads an input.

Not run on a GPU. Its results were checked under Triton's interpreter, its selection with GPTQModel's own selector.
"""

# ruff: noqa: RUF012 (what a kernel supports is said in lists, which the host extends)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gptqmodel.adapter.adapter import Lora
from gptqmodel.models._const import DEVICE, PLATFORM
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.utils.backend import BACKEND

from ...kernels.dispatch import ALL, DTYPES, SWITCH, TRITON, switched_off
from ...kernels.layout import WEIGHT_BITS, LayoutError
from ...kernels.triton import available, runs_on
from .adapter import unchanged, version
from .fused import EoRAFusedLinear

# Modules of one parent that read the same input, by the names that decoders of the Llama lineage give them. A model
# that uses the names otherwise only loses the common launch (`SharedInput`).
SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class EoRATritonLinear(EoRAFusedLinear):
    """GPTQ weights and an `EoRA` adapter in one pass on a GPU; on another device, what `EoRAFusedLinear` does.

    Weights stay as the checkpoint has them; nothing is repacked or copied but the factors A, which are stacked.
    """

    # The host reads what a class supports from its own body, so nothing of it can be left to the base.
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shared = SharedInput([self])

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
        return self._shared(self, x) if self._launchable(x) else super().forward(x)

    def _launchable(self, x: torch.Tensor) -> bool:
        return (
            runs_on(x.device)
            and self.qweight.device == x.device
            and x.dtype in DTYPES
            and x.shape[-1] == self.in_features
            and not (self.online_full_had or self.online_partial_had)
            and not self._off & {ALL, TRITON}
            and not (
                torch.is_grad_enabled() and (x.requires_grad or (self.adapter is not None and self.adapter.trained))
            )
        )

    def state(self) -> tuple[Any, ...]:
        """What the launches were prepared from: they are prepared again when one of these is replaced or written to."""
        tensors = [self.qweight, self.qzeros, self.scales, self.g_idx, self.bias]
        tensors += [None, None] if self.adapter is None else [self.adapter.lora_A, self.adapter.lora_B]
        return (*tensors, *(0 if one is None else version(one) for one in tensors))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        self._shared.forget()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._shared.forget()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is alone with its input; `share_inputs` is for whole models."""
        return {**super().__getstate__(), "_shared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._shared = SharedInput([self])


class SharedInput:
    """Modules that read the same input, computed together when the first of them is called.

    What the others will ask for is kept until they do. Should one of them be called with something else first, then
    they do not share their input after all, and each goes alone from then on.

    Compiled by `torch.compile`, a model keeps the launches as they were prepared, and must not write to an input
    between two modules that read it: tensors do not tell their version while they are traced.

    Args:
        modules: of equal inputs, bits, group size and kind of factors.
    """

    def __init__(self, modules: Sequence[EoRATritonLinear]) -> None:
        self._modules = tuple(modules)
        self._prepared: tuple[tuple[Any, ...], Any] | None = None
        self._waiting: tuple[torch.Tensor, int, dict[int, torch.Tensor]] | None = None

    def __call__(self, module: EoRATritonLinear, x: torch.Tensor) -> torch.Tensor:
        """y of ``module``."""
        written = version(x)
        if self._waiting is not None:
            known, known_written, waiting = self._waiting
            if known is x and known_written == written and id(module) in waiting:
                y = waiting.pop(id(module))
                if not waiting:
                    self._waiting = None
                return y
            self._part()
            return module._shared(module, x)
        ys = dict(zip(map(id, self._modules), self.prepare()(x), strict=True))
        y = ys.pop(id(module))
        if ys:
            self._waiting = (x, written, ys)
        return y

    def prepare(self) -> Any:
        """The launches (`kernels.triton.ops.FusedLinears`), prepared now unless they are.

        Raises:
            LayoutError: when the modules cannot share a launch, or a checkpoint's tensors do not belong together.
        """
        if self._prepared is not None and torch.compiler.is_compiling():
            return self._prepared[1]
        state = tuple(entry for module in self._modules for entry in module.state())
        if self._prepared is None or not unchanged(self._prepared[0], state):
            from ...kernels.triton.ops import FusedLinears

            factors = [
                module.adapter.factors(module.qweight.device) if module.adapter is not None else None
                for module in self._modules
            ]
            fused = FusedLinears.prepare(
                [module.packed() for module in self._modules], factors, [module.bias for module in self._modules]
            )
            self._prepared = (state, fused)
        return self._prepared[1]

    def forget(self) -> None:
        """Have the launches prepared again: the modules' tensors were moved or loaded."""
        self._prepared = self._waiting = None

    def _part(self) -> None:
        self._waiting = None
        for module in self._modules:
            module._shared = SharedInput([module])


def share_inputs(kernels: Mapping[str, Any]) -> None:
    """Let the kernels of a model that read the same input share their launches, and prepare these.

    Args:
        kernels: module name → kernel; those of other classes, or not on a GPU, are passed over.

    Raises:
        LayoutError: when a checkpoint's tensors do not belong together.
    """
    ours = {
        name: kernel
        for name, kernel in kernels.items()
        if isinstance(kernel, EoRATritonLinear) and runs_on(kernel.qweight.device)
    }
    for kernel in ours.values():
        kernel._shared.prepare()
    for parent in {name.rpartition(".")[0] for name in ours}:
        for names in SHARING:
            found = [ours[full] for name in names if (full := f"{parent}.{name}" if parent else name) in ours]
            shared = SharedInput(found)
            try:
                shared.prepare()
            except LayoutError:
                continue  # of different bits, say: each alone
            for kernel in found:
                kernel._shared = shared
