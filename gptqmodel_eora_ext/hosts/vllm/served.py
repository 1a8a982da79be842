"""A layer ready to be multiplied with: its parts, their adapters and biases, in as few calls as their forms allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...formats.factors import Factors
from ...formats.packed_weights import LayoutError, PackedWeight
from ...kernels.cpu.repack import RepackedWeight
from ...kernels.dispatch import switched_off
from ...kernels.fused import FusedLinear, JointLinears
from .checkpoint import Checkpoint
from .parts import Part

# y of some parts side by side, rows × their outputs, of x, rows × in.
Multiply = Callable[[torch.Tensor], torch.Tensor]
# Places of parts that are multiplied in one call, and that call.
Groups = list[tuple[list[int], Multiply]]


class ServedLinear:
    """y = x Ŵᵀ + (x Aᵀ) Bᵀ + bias of a layer of vLLM, whose parts stand side by side in y.

    Parts that read x in the same order and groups share one call, and with it x in integers and x Aᵀ.

    Args:
        checkpoint: that the parts are of.
        parts: of the layer, in the order of its outputs.
        bias: of the whole layer; None for none, or for one that vLLM adds.
        padding: outputs of zeros at the end, as vLLM pads vocabularies.
    """

    def __init__(
        self, checkpoint: Checkpoint, parts: Sequence[Part], bias: torch.Tensor | None, padding: int = 0
    ) -> None:
        self.checkpoint, self.parts, self.padding = checkpoint, tuple(parts), padding
        self.in_features = parts[0].share.in_features
        self.part_widths = [part.share.out_features for part in parts]
        self.out_features = sum(self.part_widths) + padding
        self.device = parts[0].device
        self.adds_bias = bias is not None
        self._biases: list[torch.Tensor | None] = [None] * len(parts)
        if bias is not None:
            self._biases = list(bias.detach()[: sum(self.part_widths)].split(self.part_widths))
        self._groups = _grouped(self.parts, self._biases)
        self._without_factors: Groups | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """y, … × out in x's dtype, of x, … × in, with the checkpoint's own adapter."""
        return self.with_groups(x, self._groups)

    def bare(self, x: torch.Tensor) -> torch.Tensor:
        """y without the checkpoint's own adapter."""
        self.prepare_bare()
        assert self._without_factors is not None
        return self.with_groups(x, self._without_factors)

    def prepare_bare(self) -> None:
        """Get ready for `bare`; on a GPU that waits for the device, which nothing may while a graph is captured."""
        if self._without_factors is None:
            self._without_factors = self.groups([None] * len(self.parts))

    def groups(self, factors: Sequence[Any]) -> Groups:
        """What multiplies the same weights with other factors, one for each part or None; weights are not copied."""
        parts = [replace(part, factors=own) for part, own in zip(self.parts, factors, strict=True)]
        return _grouped(parts, self._biases)

    def with_groups(self, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        """y by what `groups` gave."""
        rows = x if x.ndim == 2 else x.reshape(-1, self.in_features)
        if len(groups) == 1 and not self.padding:
            # As most layers are: this runs for every layer and token.
            joined = groups[0][1](rows)
        else:
            found: dict[int, torch.Tensor] = {}
            for places, multiply in groups:
                widths = [self.part_widths[place] for place in places]
                found.update(zip(places, multiply(rows).split(widths, dim=1), strict=True))
            ys = [found[place] for place in range(len(self.parts))]
            if self.padding:
                ys.append(rows.new_zeros(rows.shape[0], self.padding))
            joined = torch.cat(ys, dim=1)
        return joined if x.ndim == 2 else joined.view(*x.shape[:-1], self.out_features)


def _grouped(parts: Sequence[Part], biases: Sequence[torch.Tensor | None]) -> Groups:
    """Parts that can be multiplied in one call, and that call."""
    groups: list[list[int]] = []
    for place, part in enumerate(parts):
        fitting = next((group for group in groups if _joins(parts[group[0]], part)), None)
        if fitting is None:
            groups.append([place])
        else:
            fitting.append(place)
    return [(group, _multiplier([parts[place] for place in group], [biases[place] for place in group]))
            for group in groups]  # fmt: skip


def _joins(first: Part, other: Part) -> bool:
    if isinstance(first.weight, RepackedWeight) and isinstance(other.weight, RepackedWeight):
        return other.weight.reads_as(first.weight)
    if isinstance(first.weight, PackedWeight) and isinstance(other.weight, PackedWeight):
        return _stacks_as(first) == _stacks_as(other)
    return False


def _stacks_as(part: Part) -> tuple[Any, ...]:
    """What modules of one launch on a GPU have in common (`StackedLinears.prepare`)."""
    assert isinstance(part.weight, PackedWeight)
    factors: Any = part.factors
    kind = None if factors is None else (factors.packed, factors.down.bits if factors.packed else factors.down.dtype)
    return part.weight.bits, part.weight.group_size, part.weight.in_features, kind


def _multiplier(parts: Sequence[Part], biases: Sequence[torch.Tensor | None]) -> Multiply:
    first = parts[0].weight
    if isinstance(first, torch.Tensor):
        return _Dense(first, biases[0])
    if isinstance(first, PackedWeight):
        return _stacked(parts, biases)
    off = switched_off()
    layers = []
    for part, bias in zip(parts, biases, strict=True):
        assert isinstance(part.weight, RepackedWeight)
        layers.append(FusedLinear(part.weight, part.factors, bias, off, part.name))  # type: ignore[arg-type]
    return JointLinears(layers).joined


def _stacked(parts: Sequence[Part], biases: Sequence[torch.Tensor | None]) -> Multiply:
    """The Triton kernels. What is prepared here was run on a GPU under GPTQModel, not under vLLM."""
    from ...kernels.triton import runs_on

    if not runs_on(parts[0].device):
        raise LayoutError(f"{parts[0].name}: there is no kernel for {parts[0].device}; on a GPU, install Triton.")
    from ...kernels.triton.ops import StackedLinears

    weights, factors = [], []
    for part in parts:
        assert isinstance(part.weight, PackedWeight)
        assert part.factors is None or isinstance(part.factors, Factors)
        weights.append(part.weight)
        factors.append(part.factors)
    multiply = StackedLinears.prepare(weights, factors, biases)

    def side_by_side(x: torch.Tensor) -> torch.Tensor:
        ys = multiply(x)
        return ys[0] if len(ys) == 1 else torch.cat(list(ys), dim=1)

    return side_by_side


class _Dense:
    """A module in 16 bits beside quantised ones in one layer."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._weight.dtype != x.dtype:
            self._weight = self._weight.to(x.dtype)
        bias = None if self._bias is None else self._bias.to(x.dtype)
        return torch.nn.functional.linear(x, self._weight, bias)
