"""`EoRA`, the adapter type that GPTQModel's users pass where they passed `Lora`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gptqmodel.adapter.adapter import Lora
from gptqmodel.utils.logger import setup_logger

from ...adapter.folder import AdapterFolder, ReadFactors
from ...adapter.options import AdapterOptions
from ...adapter.vocabulary import AUTO
from ...formats.factors import Factors
from ...kernels.dispatch import ALL, CORRECTION, DTYPES, switched_off
from ...kernels.reference import parts_of
from ...kernels.row_weights import Mixture, RowWeights, member_of
from ...kernels.triton import runs_on
from ...kernels.versions import unchanged
from ...plan import Plan, plan_to_follow
from ...refine import RefineSettings
from .installed import require_installed
from .kept_factors import KeepsFactors

# The path of an adapter that has no folder and no factors, and only says that the plugin's kernels are wanted. Without
# a path the host would take it for an adapter whose factors lie among the weights, and make room for them.
KERNELS_ALONE = "(none: the plugin's kernels alone)"
# Each adapter's number, by which launches of several adapters in captured graphs use counters of their own
# (`kernels.triton.adding.add_correction`).
_slots = itertools.count()


class EoRA(KeepsFactors, Lora):
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
        refine: train the factors of all modules together once the checkpoint is written, by what the whole model loses
            (docs/refinement.md): tokens as 160000 or "160k", or a mapping of settings such as
            `{"tokens": "160k", "loss": "kl"}`. The calibration data has to have that many; None for no training.
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
        refine: int | str | Mapping[str, Any] | RefineSettings | None = None,
    ) -> None:
        require_installed()
        self.plan = None if plan is None else plan_to_follow(plan, rank=rank, budget=budget)
        if self.plan is not None:
            rank, factor_bits = self.plan.largest_rank, self.plan.factor_bits
        self.refine = RefineSettings.of(refine, what="EoRA: `refine`")
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"EoRA: `path` must be a folder's path, got {path!r} ({type(path).__name__}).")
        if path is not None:
            path = str(Path(path).expanduser())
        self._asked: dict[str, Any] = {
            "objective": objective, "factor_bits": factor_bits, "sensitivity": sensitivity, "rounds": rounds,
        }  # fmt: skip
        self.options = AdapterOptions.settle(rank=rank, budget=budget, preset=preset, **self._asked)
        KeepsFactors.__init__(self)
        self._off = switched_off()
        self._slot = next(_slots)
        self.mixture: Mixture | None = None
        self._owners: torch.Tensor | None = None
        Lora.__init__(self, rank=self.options.rank, path=path, lora_A=lora_A, lora_B=lora_B)  # type: ignore[arg-type]

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
            **({"refine": asdict(self.refine)} if self.refine is not None else {}),
        }

    def weights(self, rows: int) -> torch.Tensor | None:
        """Weights of the members for so many rows on the CPU, as kernels take them; None for one adapter."""
        return None if self.mixture is None else self.mixture.now.for_rows(rows)

    def apply(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Add (x Aᵀ) Bᵀ to the kernel's output, … × out, in place, and return it; without factors nothing is added.

        Of an ensemble, ((x Aᵀ) ∘ g) Bᵀ is added, g the weights of the call under way; members without any are not
        read. The product is computed in the dtype of x, … × in. The adapter's own factors stay in theirs.
        """
        if not self.has_factors:
            return out
        lora_A, lora_B = self._like(x)
        if self.mixture is not None:
            return self._apply_weighed(x, out, lora_A, lora_B, self.mixture.now)
        if self._in_one_launch(x, out, lora_A, lora_B):
            from ...kernels.triton.adding import add_correction

            add_correction(x, lora_A.T, lora_B, out, self._slot)
            return out
        if x.is_cuda and out.is_contiguous():
            # Two launches where GPTQModel's `Lora` makes three, and one pass less over the output.
            out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ lora_A, lora_B)
            return out
        # Some kernels flatten x to rows and leave out in its shape, others do the reverse.
        return out.add_(((x @ lora_A) @ lora_B).reshape(out.shape))

    def _apply_weighed(
        self, x: torch.Tensor, out: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, weights: RowWeights
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        given = weights.for_rows(len(rows), x.device)
        if self._in_one_launch(x, out, lora_A, lora_B):
            from ...kernels.triton.adding import add_correction

            add_correction(x, lora_A.T, lora_B, out, self._slot, given, self._member_of(x.device))
            return out
        y = out.view(-1, out.shape[-1])
        for member, part in enumerate(parts_of(self._members)):
            if member in weights.live and part.start < part.stop:
                t = rows @ lora_A[:, part] * given[:, member : member + 1]
                y.add_(t.to(y.dtype) @ lora_B[part])
        return out

    def _member_of(self, device: torch.device) -> torch.Tensor:
        """The member that each component belongs to, int32."""
        found = self._owners
        if found is None or found.device != device:
            found = self._owners = member_of(self._members).to(device)
        return found

    def _like(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Aᵀ and Bᵀ in x's dtype and on its device: the factors, or copies that are kept until either side changes."""
        if torch.compiler.is_compiling() or self.trained:
            # A gradient has to reach the factors; and a trace would keep a copy without seeing that factors change.
            lora_A, lora_B = self._pair()
            return lora_A.to(x.device, x.dtype), lora_B.to(x.device, x.dtype)
        first, second = self._floats
        if first is None and isinstance(self._form, Factors) and not self._form.packed:
            first, second = self._pair()
        if first is not None and first.dtype == x.dtype and first.device == x.device:
            assert second is not None
            return first, second
        state = (*self.state(), x.dtype, x.device)
        if self._converted is None or not unchanged(self._converted[0], state):
            lora_A, lora_B = self._pair()
            self._converted = (state, (lora_A.to(x.device, x.dtype), lora_B.to(x.device, x.dtype)))
        return self._converted[1]

    def _in_one_launch(self, x: torch.Tensor, out: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> bool:
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

    def attach_members(self, factors: Factors | None, mixture: Mixture, device: torch.device) -> None:
        """Take the factors of an ensemble's members for one module, stacked.

        Args:
            factors: with `members`; None where no member has any for the module.
            mixture: the ensemble's, which tells the members' weights.
            device: where 16-bit factors are kept.
        """
        self.mixture = mixture
        if factors is not None:
            self.rank = factors.rank
            self._attach(factors, device)

    def attach(self, factors: ReadFactors, device: torch.device) -> None:
        """Take a module's factors, in the form that they are stored in; plain tensors are made where somebody asks."""
        self.rank = factors.lora_A.shape[0]
        packed = factors.packed
        self._attach(Factors(*packed) if packed else Factors(factors.lora_A, factors.lora_B.T), device)

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
            self._move(device)
