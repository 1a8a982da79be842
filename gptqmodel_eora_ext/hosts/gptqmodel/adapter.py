"""`EoRA`, the adapter type that GPTQModel's users pass where they passed `Lora`."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gptqmodel.adapter.adapter import Lora
from gptqmodel.utils.logger import setup_logger

from ...adapter.folder import AdapterFolder, ReadFactors
from ...adapter.options import AdapterOptions
from ...adapter.vocabulary import AUTO
from ...formats.factors import Factors, QuantizedFactor
from ...kernels.dispatch import ALL, CORRECTION, DTYPES, switched_off
from ...kernels.triton import runs_on
from ...kernels.versions import counting_writes, unchanged, version
from ...plan import Plan
from .installed import require_installed

# The path of an adapter that has no folder and no factors, and only says that the plugin's kernels are wanted. Without
# a path the host would take it for an adapter whose factors lie among the weights, and make room for them.
KERNELS_ALONE = "(none: the plugin's kernels alone)"
# Each adapter's number, by which launches of several adapters in captured graphs use counters of their own
# (`kernels.triton.ops.add_correction`).
_slots = itertools.count()


def _uses(tensor: torch.Tensor) -> int:
    """How many things refer to a tensor's storage, views included; 0 where this torch cannot tell."""
    count = getattr(tensor, "_use_count", None)
    return 0 if count is None else int(count())


def _references(values: Sequence[Any]) -> list[int]:
    """Reference counts of the values in a list. One that nobody else refers to has the count of a new object there."""
    return [sys.getrefcount(value) for value in values]


class EoRA(Lora):
    """Training-free low-rank compensation of the quantisation error.

    Example:
        >>> model = GPTQModel.load("Qwen/Qwen3-8B", QuantizeConfig(bits=2, group_size=64))
        >>> model.quantize(calibration, adapter=EoRA(rank=64))
        >>> model.save("out")
        >>> model = GPTQModel.load("out")  # finds the adapter that the checkpoint names
        >>> model = GPTQModel.load("out", adapter=EoRA(path="adapters/r64"))  # loads another one
        >>> model = GPTQModel.load("plain", adapter=EoRA())  # no adapter: the plugin's kernels for a plain checkpoint

    Args:
        rank: components per module, at least 1; when loading, the folder tells. A rank above min(out, in) of a module
            is cut to that, with a warning. "auto", or a budget in place of a rank, gives every module the rank that
            buys most. `EoRA()` quantises by the preset "balanced" and says what that is.
        path: the adapter's folder. Loading: where to read from. Quantising: where `save()` writes; left out, the
            folder `eora` of the checkpoint; a relative path counts from the checkpoint.
        objective: what the factors minimise: "eora" (the error of the output, inputs as they occur), "output" (also
            what earlier layers did to the inputs), "diagonal" (channels by their size), "svd" (the weights alone).
        factor_bits: 16 for a plain PEFT adapter; 8 or 4 for packed integers, which need this plugin to load. Left
            out, what the preset says, or 16.
        budget: bytes of all factors, as a number or "300MB", as "0.25bpw" (bits per quantised weight), or as "r32"
            (what a 16-bit rank 32 takes). Left out with rank "auto", "0.5bpw".
        sensitivity: under a budget, what an error in a module is taken to cost: "fisher" (gradients of the loss,
            labels drawn from the model), "empirical" (the text's own labels), "relative" (its share of the module's
            output; no gradients); or "uniform" for one rank for all. Left out, what the preset says, or "fisher".
        rounds: how often GPTQ quantises a module: first W, then W − BA with the last round's factors. The best round is
            kept. Each costs a quantisation. Left out, what the preset says, or 1.
        preset: "fast", "balanced" or "best": factor_bits, sensitivity and rounds that go together (docs/budget.md).
        plan: a `Plan` of `eora plan`, or its file, in place of ``rank``: the ranks and the bits of the factors. The
            model has to be loaded with `QuantizeConfig(**plan.quantize_config())`, which names them module by module.
        lora_A: in_features × rank; only GPTQModel itself passes factors.
        lora_B: rank × out_features.

    Raises:
        ValueError: for a rank that is no positive integer, a rank beside a budget, a plan beside either or without any
            adapter, a path that is no string or path, an unknown objective, preset or number of bits, or a gptqmodel
            version that the plugin cannot serve.
    """

    rank: int | str | None
    path: str | None

    def __init__(
        self,
        rank: int | str | None = None,
        path: str | os.PathLike[str] | None = None,
        lora_A: torch.Tensor | None = None,
        lora_B: torch.Tensor | None = None,
        objective: str = "eora",
        factor_bits: int | None = None,
        budget: int | str | None = None,
        sensitivity: str | None = None,
        rounds: int | None = None,
        preset: str | None = None,
        plan: Plan | str | os.PathLike[str] | None = None,
    ) -> None:
        require_installed()
        self.plan = plan if plan is None or isinstance(plan, Plan) else Plan.read(plan)
        if self.plan is not None:
            if rank is not None or budget is not None:
                raise ValueError("EoRA: `plan` names the ranks; leave `rank` and `budget` out.")
            if not self.plan.largest_rank:
                raise ValueError("EoRA: the plan gives no module an adapter; quantise with its config and no adapter.")
            rank, factor_bits = self.plan.largest_rank, self.plan.factor_bits
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"EoRA: `path` must be a folder's path, got {path!r} ({type(path).__name__}).")
        if path is not None:
            path = str(Path(path).expanduser())
        self._asked: dict[str, Any] = {
            "objective": objective, "factor_bits": factor_bits, "sensitivity": sensitivity, "rounds": rounds,
        }  # fmt: skip
        self.options = AdapterOptions.settle(rank=rank, budget=budget, preset=preset, **self._asked)
        self._floats: list[torch.Tensor | None] = [None, None]
        self._packed: tuple[QuantizedFactor, QuantizedFactor] | None = None
        self._unpacked_at: tuple[int, int] | None = None
        self._device = torch.device("cpu")
        self._factors: tuple[tuple[Any, ...], Factors] | None = None
        self._converted: tuple[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] | None = None
        self._off = switched_off()
        self._slot = next(_slots)
        super().__init__(rank=self.options.rank, path=path, lora_A=lora_A, lora_B=lora_B)  # type: ignore[arg-type]

    @property
    def budget(self) -> int | str | None:
        """As asked, or the default of rank "auto"."""
        return self.options.budget

    @property
    def objective(self) -> str:
        """What the factors minimise."""
        return self.options.objective

    @property
    def factor_bits(self) -> int:
        """Bits of a stored factor."""
        return self.options.factor_bits

    @property
    def sensitivity(self) -> str:
        """What an error is taken to cost under a budget."""
        return self.options.sensitivity

    @property
    def rounds(self) -> int:
        """Times that a module is quantised."""
        return self.options.rounds

    @property
    def preset(self) -> str | None:
        """As asked, or the default of `EoRA()`."""
        return self.options.preset

    @property
    def kernels_alone(self) -> bool:
        """Whether it has no folder and no factors, and says only that the plugin's kernels are wanted."""
        return self.path == KERNELS_ALONE

    def settle_for_loading(self) -> None:
        """Where neither a folder nor a rank was given for a checkpoint, have it stand for the kernels alone."""
        if self.path is None and self.rank is None and not self.has_factors:
            self.path: str | None = KERNELS_ALONE

    def settle_for_making(self) -> None:
        """Where nothing was asked of an adapter that is to be made, take the default preset and say so."""
        if self.rank is not None:
            return
        self.options = self.options.for_making(**self._asked)
        self.rank = self.options.rank
        setup_logger().info(
            f"EoRA: neither a rank nor a budget was given; preset {self.preset!r}: {self.budget} of factors in "
            f"{self.factor_bits} bits, ranks by sensitivity {self.sensitivity!r}."
        )

    def __repr__(self) -> str:
        shown = {key: value for key, value in self.to_dict().items() if key != "name"}
        return f"EoRA({', '.join(f'{key}={value!r}' for key, value in shown.items())})"

    @classmethod
    def name(cls) -> str:
        """Name in serialised configs."""
        return "eora"

    def to_dict(self) -> dict[str, Any]:
        """The form `QuantizeConfig(adapter=…)` accepts."""
        source = self._gptqmodel_checkpoint_source
        return {
            "name": self.name(),
            "rank": self.rank,
            "path": source[1] if source else self.path,
            "objective": self.objective,
            "factor_bits": self.factor_bits,
            **({"budget": self.budget, "sensitivity": self.sensitivity} if self.rank == AUTO else {}),
            **({"rounds": self.rounds} if self.rounds > 1 else {}),
            **({"preset": self.preset} if self.preset is not None else {}),
        }

    def apply(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Add (x Aᵀ) Bᵀ to the kernel's output, … × out, in place, and return it; without factors nothing is added.

        The product is computed in the dtype of x, … × in. The adapter's own factors stay in theirs.
        """
        if not self.has_factors:
            return out
        lora_A, lora_B = self._like(x)
        if self._in_one_launch(x, out, lora_A, lora_B):
            from ...kernels.triton.ops import add_correction

            add_correction(x, lora_A.T, lora_B, out, self._slot)
            return out
        if x.is_cuda and out.is_contiguous():
            # Two launches where GPTQModel's `Lora` makes three, and one pass less over the output.
            out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ lora_A, lora_B)
            return out
        # Some kernels flatten x to rows and leave out in its shape, others do the reverse.
        return out.add_(((x @ lora_A) @ lora_B).reshape(out.shape))

    def _like(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Aᵀ and Bᵀ in x's dtype and on its device: the factors, or copies that are kept until either side changes."""
        if torch.compiler.is_compiling() or self.trained:
            # A gradient has to reach the factors; and a trace would keep a copy without seeing that factors change.
            lora_A, lora_B = self.lora_A, self.lora_B
            assert lora_A is not None and lora_B is not None
            return lora_A.to(x.device, x.dtype), lora_B.to(x.device, x.dtype)
        first = self._floats[0]
        if first is not None and first.dtype == x.dtype and first.device == x.device:
            second = self._floats[1]
            assert second is not None
            return first, second
        state = (*self.state(), x.dtype, x.device)
        if self._converted is None or not unchanged(self._converted[0], state):
            lora_A, lora_B = self._unpacked() if first is None else self._floats
            assert lora_A is not None and lora_B is not None
            self._converted = (state, (lora_A.to(x.device, x.dtype), lora_B.to(x.device, x.dtype)))
        return self._converted[1]

    def _in_one_launch(
        self, x: torch.Tensor, out: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor
    ) -> bool:
        """Whether the plugin's own kernel can add the correction to ``out``."""
        return (
            runs_on(x.device)
            and out.device == x.device
            and out.dtype == x.dtype
            and x.dtype in DTYPES
            and out.is_contiguous()
            and lora_A.T.is_contiguous()
            and lora_B.is_contiguous()
            and not self._off & {ALL, CORRECTION}
            and not (torch.is_grad_enabled() and (self.trained or x.requires_grad or out.requires_grad))
        )

    @property
    def lora_A(self) -> torch.Tensor | None:
        """Aᵀ, in_features × rank; packed factors are unpacked for whoever asks, float32."""
        return self._float(0)

    @lora_A.setter
    def lora_A(self, value: torch.Tensor | None) -> None:
        self._set_float(0, value)

    @property
    def lora_B(self) -> torch.Tensor | None:
        """Bᵀ, rank × out_features, likewise."""
        return self._float(1)

    @lora_B.setter
    def lora_B(self, value: torch.Tensor | None) -> None:
        self._set_float(1, value)

    @property
    def packed(self) -> tuple[QuantizedFactor, QuantizedFactor] | None:
        """A and Bᵀ in integers as they were stored; None where they were not, or were written to since."""
        if self._unpacked_at is not None and self._unpacked_at != self._versions():
            return None
        return self._packed

    @packed.setter
    def packed(self, value: tuple[QuantizedFactor, QuantizedFactor] | None) -> None:
        self._packed = value
        self._unpacked_at = None if self._floats[0] is None else self._versions()

    @property
    def has_factors(self) -> bool:
        """Whether the module has any; asking for `lora_A` would unpack it."""
        return self._packed is not None or all(one is not None for one in self._floats)

    def stored(self) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
        """Aᵀ, Bᵀ and the packed factors as they lie here: nothing is unpacked."""
        if self._unpacked_at is not None:
            self._forget_unpacked()
        return self._floats[0], self._floats[1], self._packed

    def state(self) -> tuple[Any, ...]:
        """Objects and counts of writes; one of them at least differs once the factors are others or were written to."""
        return (*self.stored(), *self._versions())

    def _versions(self) -> tuple[int, int]:
        first, second = (0 if one is None else version(one) for one in self._floats)
        return first, second

    def _float(self, index: int) -> torch.Tensor | None:
        if self._floats[index] is None and self._packed is not None:
            self._floats = [one.to(self._device) for one in self._unpacked()]
            self._unpacked_at = self._versions()
        return self._floats[index]

    def _forget_unpacked(self) -> None:
        """Let go of what was unpacked for somebody who only looked, as the host's loader does at each module."""
        if self._packed is None or self._versions() != self._unpacked_at:
            return
        # Nobody else can write to a tensor that no other Python object and no view refers to.
        unseen = _references(self._floats) == _references([object(), object()])
        if unseen and all(one is not None and _uses(one) == 1 for one in self._floats):
            self._floats, self._unpacked_at = [None, None], None

    def _set_float(self, index: int, value: torch.Tensor | None) -> None:
        self._float(1 - index)  # unpacks the other factor where it is packed, so that it keeps its values
        self._floats[index] = None if value is None else counting_writes(value)
        self._packed = self._unpacked_at = None

    def _unpacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Aᵀ and Bᵀ of packed factors, float32, in the layouts that stock `Lora` multiplies with."""
        assert self._packed is not None
        with torch.inference_mode(False), torch.no_grad():
            # A copy in place of a view of something else: `_forget_unpacked` counts the views of this tensor alone.
            return self._packed[0].dequantize().T.clone(), self._packed[1].dequantize()

    def factors(self, device: torch.device) -> Factors | None:
        """The factors on ``device`` as kernels take them, packed if they are stored so; None without any."""
        if not self.has_factors:
            return None
        state = (*self.state(), device)
        if self._factors is None or not unchanged(self._factors[0], state):
            packed = self.packed
            if packed is not None:
                found = Factors(packed[0].to(device), packed[1].to(device))
            else:
                lora_A, lora_B = self._floats
                assert lora_A is not None and lora_B is not None
                found = Factors(lora_A.detach().T.to(device), lora_B.detach().to(device))
            self._factors = (state, found)
        return self._factors[1]

    @property
    def trained(self) -> bool:
        """Whether a factor wants a gradient."""
        lora_A, lora_B = self._floats
        return (lora_A is not None and lora_A.requires_grad) or (lora_B is not None and lora_B.requires_grad)

    def attach(self, factors: ReadFactors, device: torch.device) -> None:
        """Take a module's factors onto ``device``; packed ones stay packed, and are unpacked where somebody asks."""
        self.rank = factors.lora_A.shape[0]
        self._device = device
        if factors.packed is not None:
            self._floats, self._unpacked_at, self._packed = [None, None], None, factors.packed
            return
        # The layouts stock `Lora` multiplies with, so that logits agree to the last bit.
        self.lora_A = factors.lora_A.to(device).T
        self.lora_B = factors.lora_B.to(device).T.contiguous()

    def post_init(
        self,
        weight_key: str,
        device: torch.device,
        lora_A: torch.Tensor | None = None,
        lora_B: torch.Tensor | None = None,
    ) -> None:
        """What a kernel calls once its weights are loaded.

        The loader attaches all factors before this (`checkpoint.attach_adapters`); a kernel that is initialised by
        another way reads its own here.
        """
        if lora_A is not None and lora_B is not None:
            self.lora_A, self.lora_B = lora_A, lora_B
        elif not self.has_factors and self.path and not self.kernels_alone:
            folder = AdapterFolder.open(self.path)
            for _, factors in folder.factors([name for name in folder.keys if name == weight_key]):
                self.attach(factors, device)
        else:
            self._device = device
            if any(one is not None and one.device != device for one in self._floats):
                packed = self.packed
                self._floats = [None if one is None else one.to(device) for one in self._floats]
                self.packed = packed
