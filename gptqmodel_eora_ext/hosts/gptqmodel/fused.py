"""The kernel class that GPTQModel's own selection picks on a CPU for a checkpoint with an `EoRA` adapter."""

# ruff: noqa: RUF012 (what a kernel supports is said in lists, which the host extends)

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gptqmodel.adapter.adapter import Lora
from gptqmodel.models._const import DEVICE, PLATFORM
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.utils.backend import BACKEND

from ...formats.packed_weights import WEIGHT_BITS, PackedWeight
from ...kernels.cpu.build import library
from ...kernels.cpu.repack import RepackedWeight, repack_weight
from ...kernels.dispatch import ALL, DTYPES, FEW_ROWS, SWITCH, TORCH, Choice, choose, switched_off
from ...kernels.fused import FusedLinear, JointLinears
from ...kernels.shared_input import Joint, SharedInput, SharesInput
from ...kernels.versions import counting_writes, version
from .adapter import EoRA

# The buffers that a weight consists of.
PACKED = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class _Made:
    """A layer, the tensors that it was made from (`PACKED`, bias, factors), and how often each was written to."""

    tensors: tuple[Any, ...]
    versions: list[int]
    weight: RepackedWeight
    layer: FusedLinear


class EoRAFusedLinear(SharesInput, TorchLinear):
    """GPTQ weights and an `EoRA` adapter in one pass on the CPU; on another device, what `TorchLinear` does.

    The checkpoint's tensors stay as buffers beside their repacked copy, for `state_dict` and for saving.
    """

    SUPPORTS_BACKENDS = [BACKEND.GPTQ_TORCH]
    # An explicit backend names the host's own kernel; this one is entered into the automatic order by hand (`seams`).
    SUPPORTS_BACKEND_SELECTION = False
    SUPPORTS_RAW_PACKING = False
    SUPPORTS_METHODS = [METHOD.GPTQ]
    # The priority orders nothing here, but also ranks formats to pack into, where this kernel should not count.
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
    SUPPORTS_DEVICES = [DEVICE.CPU]
    SUPPORTS_PLATFORM = [PLATFORM.ALL]
    SUPPORTS_PACK_DTYPES = [torch.int32]
    # `EoRA` is added as it is to every kernel that takes `Lora`; `validate` leaves stock adapters to stock kernels.
    SUPPORTS_ADAPTERS = [Lora]
    SUPPORTS_DTYPES = list(DTYPES)
    REQUIRES_FORMAT_V2 = True
    QUANT_TYPE = "eora_fused"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._off = switched_off()
        self._fusable_cases: dict[tuple[torch.dtype, bool], bool] = {}
        self._made: _Made | None = None
        self.shared = SharedInput([self])

    @classmethod
    def validate(cls, *args: Any, adapter: Any = None, **kwargs: Any) -> tuple[bool, Exception | None]:
        """Whether this class can serve a module; the reason where it cannot."""
        if not isinstance(adapter, EoRA):
            return False, NotImplementedError(f"{cls.__name__} serves models with an EoRA adapter, got {adapter}.")
        if ALL in switched_off():
            return False, NotImplementedError(f"{cls.__name__} is switched off by {SWITCH}={ALL}.")
        return super().validate(*args, adapter=adapter, **kwargs)

    @classmethod
    def validate_once(cls) -> tuple[bool, Exception | None]:
        if library() is None:
            return False, ImportError(f"{cls.__name__}: the CPU kernels could not be compiled.")
        return True, None

    def optimize(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left for `torch.compile` to fuse."""
        self.optimized = True

    def post_init(self) -> None:
        super().post_init()
        if self.qweight.is_cpu:
            self._layer(self.adapter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features:
            found = " × ".join(map(str, x.shape))
            raise ValueError(f"{self.name}: x should be … × {self.in_features}, found {found}.")
        if not self._fusable(x):
            return super().forward(x)
        adapter = self.adapter
        trained = adapter is not None and adapter.trained and torch.is_grad_enabled()
        if not (trained or self.shared.alone or (x.requires_grad and torch.is_grad_enabled())):
            return self._with_others(x)
        return self._alone(x, trained)

    @torch.compiler.disable
    def _alone(self, x: torch.Tensor, trained: bool) -> torch.Tensor:
        """y of this module; an adapter that is ``trained`` is added by torch. Not traced: it ends in C++."""
        rows = x.reshape(-1, self.in_features)
        adapter = self.adapter
        y = adapter.apply(x=rows, out=self._layer(None)(rows)) if trained else self._layer(adapter)(rows)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.compiler.disable
    def _with_others(self, x: torch.Tensor) -> torch.Tensor:
        """y, with those of the modules that read the same x. Not traced: that would keep this call's x."""
        return self.shared(self, x).view(*x.shape[:-1], self.out_features)

    @property
    def joinable(self) -> bool:
        """As `SharesInput.joinable`."""
        return self.qweight.is_cpu

    def state(self) -> tuple[Any, ...]:
        """As `SharesInput.state`: the layer, which is another one when anything it was made from is."""
        return (self._layer(self.adapter),)

    @classmethod
    def join(cls, modules: Sequence[EoRAFusedLinear]) -> Joint:
        """As `SharesInput.join`."""
        in_features = modules[0].in_features
        joint = JointLinears([module._layer(module.adapter) for module in modules])
        return lambda x: joint(x.reshape(-1, in_features))

    def choice(self, x: torch.Tensor) -> Choice:
        """The kernel that x would be multiplied by."""
        if self.online_full_had or self.online_partial_had:
            return Choice(TORCH, reason="the module rotates its input")
        device = x.device if x.device.type != "cpu" else self.qweight.device
        return choose(device, x.dtype, self.bits, x.numel() // self.in_features, self._off)

    def _fusable(self, x: torch.Tensor) -> bool:
        """Whether x can be given to the kernels; once per dtype, since this runs for every token."""
        if not x.is_cpu or not self._buffers["qweight"].is_cpu or x.numel() == 0:
            return False
        key = (x.dtype, x.numel() > FEW_ROWS * self.in_features)
        if key not in self._fusable_cases:
            self._fusable_cases[key] = self.choice(x).path != TORCH
        return self._fusable_cases[key]

    def _layer(self, adapter: EoRA | None) -> FusedLinear:
        """The layer ready to multiply, made again when the weight, the bias or the factors changed."""
        tensors = self._made_from(adapter)
        versions = [0 if one is None or one.is_inference() else one._version for one in tensors[:-1]]
        made = self._made
        if made is None or versions != made.versions or not all(map(operator.is_, tensors, made.tensors)):
            made = self._made = self._make(adapter, made)
        return made.layer

    def _made_from(self, adapter: EoRA | None) -> tuple[Any, ...]:
        """What the layer is made from: `PACKED`, the bias, A and B, and the factors where they are packed."""
        buffers = self._buffers
        factors = (None, None, None) if adapter is None else adapter.stored()
        return (*map(buffers.__getitem__, PACKED), buffers.get("bias"), *factors)

    def _make(self, adapter: EoRA | None, made: _Made | None) -> _Made:
        """The layer, made now; the weight of the one before is taken over if it is the same."""
        for name in (*PACKED, "bias"):
            if (buffer := self._buffers.get(name)) is not None:
                self._buffers[name] = counting_writes(buffer)
        tensors = self._made_from(adapter)
        # Read first: who writes meanwhile has another layer made.
        versions = [0 if one is None else version(one) for one in tensors[:-1]]
        packed = len(PACKED)
        same = (
            made is not None
            and versions[:packed] == made.versions[:packed]
            and all(map(operator.is_, tensors[:packed], made.tensors))
        )
        weight = made.weight if made is not None and same else repack_weight(self.packed())
        factors = None if adapter is None else adapter.factors(weight.codes.device)
        layer = FusedLinear(weight, factors, self._buffers.get("bias"), self._off, self.name)
        return _Made(tensors, versions, weight, layer)

    def packed(self) -> PackedWeight:
        """The buffers, checked: what a checkpoint says is not trusted.

        Raises:
            LayoutError: for shapes, dtypes or group indices that do not belong together.
        """
        return PackedWeight(
            **{name: self._buffers[name] for name in PACKED},
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.in_features,
            out_features=self.out_features,
            name=self.name,
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # Values are copied into the buffers that are there.
        self._made = None
        self.shared.forget()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        self.shared.forget()
        return result

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: the buffers, from which it repacks by itself. It is alone with its input;
        `share_inputs` is for whole models."""
        return {**self.__dict__, "_made": None, "shared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.shared = SharedInput([self])
