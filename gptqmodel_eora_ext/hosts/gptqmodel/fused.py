"""The kernel class that GPTQModel's own selection picks on a CPU for a checkpoint with an `EoRA` adapter."""

# ruff: noqa: RUF012 (what a kernel supports is said in lists, which the host extends)

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gptqmodel.adapter.adapter import Lora
from gptqmodel.models._const import DEVICE, PLATFORM
from gptqmodel.nn_modules.qlinear.torch import TorchLinear, _LinearWeightMetadata
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.utils.backend import BACKEND

from ...formats.packed_weights import WEIGHT_BITS, PackedWeight
from ...kernels.cpu.build import library
from ...kernels.cpu.repack import RepackedWeight, repack_weight, unpack_weight
from ...kernels.dispatch import ALL, DTYPES, FEW_ROWS, SWITCH, TORCH, Choice, choose, switched_off
from ...kernels.fused import FusedLinear, JointLinears
from ...kernels.row_weights import Mixture
from ...kernels.shared_input import Joint, SharedInput, SharesInput
from ...kernels.versions import counting_writes
from .adapter import EoRA

# Names of the buffers that a packed weight consists of.
PACKED = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class _Made:
    """A layer, and what it was made from; when that changes, the layer has to be made again.

    Attributes:
        source: the weight, then the bias, and what the adapter has (`KeepsFactors.stored`). The weight is the four
            packed tensors (`PACKED`) or, once they were given up, the repacked weight and three times None.
        counted: the tensors of ``source``, which count how often they were written to.
        versions: those counts when the layer was made.
        weight: the repacked weight.
        layer: the layer.
    """

    source: tuple[Any, ...]
    counted: tuple[torch.Tensor, ...]
    versions: list[int]
    weight: RepackedWeight
    layer: FusedLinear


class _Metadata(_LinearWeightMetadata):
    """What the host's `weight` tells of dtype and device, without a look at the packed tensors."""

    def _first_tensor(self) -> torch.Tensor:
        return self._module.like_scales()

    @property
    def dtype(self) -> torch.dtype:
        return self._first_tensor().dtype


class EoRAFusedLinear(SharesInput, TorchLinear):
    """GPTQ weights and an `EoRA` adapter in one pass on the CPU; on another device, what `TorchLinear` does.

    Once they are repacked, the checkpoint's packed tensors are given up, so that a weight is in memory once. They are
    restored from the repacked form, bit for bit, for whoever asks:

    - `state_dict`, `named_buffers`, copies and pickles, and with them saving, get tensors of their own.
    - A move or a cast gives them to torch and repacks what it made of them, unless that lies on another device.
    - One that is asked for as an attribute (`module.scales`) stays from then on, with the others, since whoever asked
      may write to it; a write is noticed, and the layer is made again. The torch path asks in the same way, for an
      input in a dtype without a kernel, say.

    `buffers()` of a whole model passes over what is given up.
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
        self._repacked: RepackedWeight | None = None
        self._asked_for = False
        self._weight_metadata = _Metadata(self)
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
        self._asked_for = False
        if self._served_here:
            self._layer(self.adapter)
        elif self._repacked is None and not self._buffers["qweight"].is_meta:
            self.packed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features:
            found = " × ".join(map(str, x.shape))
            raise ValueError(f"{self.name}: x should be … × {self.in_features}, found {found}.")
        if not self._fusable(x):
            return super().forward(x)
        learning = torch.is_grad_enabled()
        trained = learning and self.adapter is not None and self.adapter.trained
        alone = self.shared.alone or trained or (learning and x.requires_grad)
        if torch.compiler.is_compiling():
            return self._untraced(x, alone, trained)
        return self._by_itself(x, trained) if alone else self._with_others(x)

    @torch.compiler.disable
    def _untraced(self, x: torch.Tensor, alone: bool, trained: bool) -> torch.Tensor:
        """y, not traced: it ends in C++, and a trace would keep the x of this call. The decorator takes as long as a
        part of a small layer, so other calls go without."""
        return self._by_itself(x, trained) if alone else self._with_others(x)

    def _by_itself(self, x: torch.Tensor, trained: bool) -> torch.Tensor:
        """y of this module; an adapter that is ``trained`` is added by torch."""
        rows = x.reshape(-1, self.in_features)
        adapter = self.adapter
        if trained:
            y = adapter.apply(x=rows, out=self._layer(None)(rows))
        else:
            y = self._layer(adapter)(rows, None if adapter is None else adapter.weights(rows.shape[0]))
        return y.view(*x.shape[:-1], self.out_features)

    def _with_others(self, x: torch.Tensor) -> torch.Tensor:
        """y, with those of the modules that read the same x."""
        return self.shared(self, x).view(*x.shape[:-1], self.out_features)

    @property
    def joinable(self) -> bool:
        """As `SharesInput.joinable`."""
        return self._served_here

    @property
    def weighed_by(self) -> object:
        """As `SharesInput.weighed_by`."""
        mixture = None if self.adapter is None else self.adapter.mixture
        return None if mixture is None else mixture.now

    @property
    def served_on_cpu(self) -> bool:
        """Whether the CPU kernels multiply with this weight where it lies now."""
        return self._served_here

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Ŵᵀ, in × out, by the CPU kernels; for a weight that they serve."""
        return self._layer(None).dense(dtype)

    @property
    def _served_here(self) -> bool:
        """As `served_on_cpu`."""
        if self.runtime_device().type != "cpu":
            return False
        return choose("cpu", torch.float32, self.bits, 1, self._off).path != TORCH

    def state(self) -> tuple[Any, ...]:
        """As `SharesInput.state`: the layer, which is another one when anything it was made from is."""
        return (self._layer(self.adapter),)

    @classmethod
    def join(cls, modules: Sequence[EoRAFusedLinear]) -> Joint:
        """As `SharesInput.join`."""
        in_features = modules[0].in_features
        joint = JointLinears([module._layer(module.adapter) for module in modules])
        mixture = mixture_of(modules)
        if mixture is None:
            return lambda x: joint(x.reshape(-1, in_features))

        def weighed(x: torch.Tensor) -> Sequence[torch.Tensor]:
            rows = x.reshape(-1, in_features)
            return joint(rows, mixture.now.for_rows(rows.shape[0]))

        return weighed

    def choice(self, x: torch.Tensor) -> Choice:
        """The kernel that x would be multiplied by."""
        if self.online_full_had or self.online_partial_had:
            return Choice(TORCH, reason="the module rotates its input")
        device = x.device if x.device.type != "cpu" else self.runtime_device()
        return choose(device, x.dtype, self.bits, x.numel() // self.in_features, self._off)

    def _fusable(self, x: torch.Tensor) -> bool:
        """Whether x can be given to the kernels; once per dtype, since this runs for every token."""
        qweight = self._buffers["qweight"]
        if not x.is_cpu or not (qweight is None or qweight.is_cpu) or x.numel() == 0:
            return False
        key = (x.dtype, x.numel() > FEW_ROWS * self.in_features)
        if key not in self._fusable_cases:
            self._fusable_cases[key] = self.choice(x).path != TORCH
        return self._fusable_cases[key]

    def _layer(self, adapter: EoRA | None) -> FusedLinear:
        """The layer ready to multiply, made again when the weight, the bias or the factors changed."""
        made, source = self._made, self._source(adapter)
        if (
            made is None
            or not all(map(operator.is_, source, made.source))
            or made.versions != [one._version for one in made.counted]
        ):
            made = self._made = self._make(adapter, made)
        return made.layer

    def _source(self, adapter: EoRA | None) -> tuple[Any, ...]:
        """What `_Made.source` would be if the layer were made now."""
        buffers, repacked = self._buffers, self._repacked
        weight = tuple(map(buffers.__getitem__, PACKED)) if repacked is None else (repacked, None, None, None)
        return (*weight, buffers.get("bias"), *((None, None, None) if adapter is None else adapter.stored()))

    def _make(self, adapter: EoRA | None, made: _Made | None) -> _Made:
        """The layer, made now; the weight of the one before is taken over if it is the same."""
        for name in (*PACKED, "bias"):
            if (buffer := self._buffers.get(name)) is not None:
                self._buffers[name] = counting_writes(buffer)
        source = self._source(adapter)
        counted = tuple(one for one in source if isinstance(one, torch.Tensor))
        # The counts are read before the values, so that the next call notices a write that comes in between.
        versions = [one._version for one in counted]
        weight = self._repacked or self._same_weight(source, made) or repack_weight(self.packed())
        factors = None if adapter is None else adapter.repacked()
        if adapter is not None and factors is adapter.form:
            source = (*source[:-1], factors)  # the adapter gave up another form for it just now
        layer = FusedLinear(weight, factors, self._buffers.get("bias"), self._off, self.name)
        if self._repacked is None and not self._asked_for and weight.rest.complete and self._gives_up:
            self._repacked = weight
            self._buffers.update(dict.fromkeys(PACKED))
            source = (weight, None, None, None, *source[len(PACKED) :])
            counted = tuple(one for one in source if isinstance(one, torch.Tensor))
            versions = versions[len(PACKED) :]
        return _Made(source, counted, versions, weight, layer)

    @staticmethod
    def _same_weight(source: tuple[Any, ...], made: _Made | None) -> RepackedWeight | None:
        """The last layer's weight, where it was made from these very tensors and none was written to since; or None."""
        packed = len(PACKED)
        if made is None or not all(map(operator.is_, source[:packed], made.source)):
            return None
        return made.weight if made.versions[:packed] == [one._version for one in source[:packed]] else None

    @property
    def _gives_up(self) -> bool:
        """Whether the packed tensors are not read by the kernels themselves."""
        return True

    def _given_back(self) -> dict[str, torch.Tensor]:
        """The packed tensors, restored anew at each call; empty where they were not given up."""
        if self._repacked is None:
            return {}
        # Tensors that are made in inference mode do not count how often they are written to.
        with torch.inference_mode(False), torch.no_grad():
            return unpack_weight(self._repacked)

    def _take_back(self) -> None:
        """Put the packed tensors where they were before they were given up."""
        self._buffers.update(self._given_back())
        self._repacked = None

    def like_scales(self) -> torch.Tensor:
        """A tensor of the dtype and device of the scales: these, or an empty one where they were given up."""
        scales = self._buffers["scales"]
        if scales is None:
            assert self._repacked is not None
            return torch.empty(0, dtype=self._repacked.rest.scales_dtype)
        return scales

    def runtime_device(self) -> torch.device:
        """Where the weight lies."""
        return self.like_scales().device

    def __getattr__(self, name: str) -> Any:
        if name in PACKED:
            self._hand_out()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PACKED:
            self._hand_out()
        super().__setattr__(name, value)

    def _hand_out(self) -> None:
        """Somebody else has a packed tensor from now on, and may write to it."""
        if "_asked_for" in self.__dict__:
            self._take_back()
            self._asked_for = True

    def only_looked_at(self) -> None:
        """Whoever asked for a packed tensor has not kept it, so that it can be given up again by the next call."""
        self._asked_for = False

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """As of any module; for buffers that were given up, new tensors of the same values."""
        with self._lent():
            found = list(super().named_buffers(*args, **kwargs))
        return iter(found)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._lent():
            super()._save_to_state_dict(*args, **kwargs)

    @contextlib.contextmanager
    def _lent(self) -> Iterator[None]:
        """Have the packed tensors that were given up in their place within the block."""
        lent = self._given_back()
        self._buffers.update(lent)
        try:
            yield
        finally:
            self._buffers.update(dict.fromkeys(lent))

    def packed(self) -> PackedWeight:
        """The buffers, checked: what a checkpoint says is not trusted.

        Raises:
            LayoutError: for shapes, dtypes or group indices that do not belong together.
        """
        given_back = self._given_back()
        return PackedWeight(
            **{name: given_back.get(name, self._buffers[name]) for name in PACKED},
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.in_features,
            out_features=self.out_features,
            name=self.name,
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._take_back()
        super()._load_from_state_dict(*args, **kwargs)
        # Values are copied into the buffers that are there.
        self._made = None
        self.shared.forget()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        given_up = self._repacked is not None
        self._take_back()
        result = super()._apply(*args, **kwargs)
        self.shared.forget()
        if given_up and self._served_here:
            self._layer(self.adapter)
        return result

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: the buffers, from which it repacks by itself. It shares its input with nobody,
        until `share_inputs` is called for a whole model."""
        buffers = {**self._buffers, **self._given_back()}
        own = {"_repacked": None, "_asked_for": False, "_made": None, "shared": None}
        return {**self.__dict__, "_buffers": buffers, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.shared = SharedInput([self])


def mixture_of(modules: Sequence[EoRAFusedLinear]) -> Mixture | None:
    """What the modules' adapters are weighed by; None where they are no ensemble's."""
    adapters = (module.adapter for module in modules)
    return next((one.mixture for one in adapters if one is not None and one.mixture is not None), None)
