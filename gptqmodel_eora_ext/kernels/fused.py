"""A linear layer over packed weights with its adapter, computed by whichever kernel is fastest here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..formats.factors import Factors
from .cpu.factors import RepackedFactors, repack_factors, unpack_factors
from .cpu.linear import CpuLinear, CpuLinears, weighed
from .cpu.repack import RepackedWeight
from .dispatch import CODES, FEW_ROWS, MATMUL, TORCH, Choice, choose


class FusedLinear:
    """y = x Ŵᵀ + ((x Aᵀ) ∘ g) Bᵀ + bias on the CPU.

    Differentiable by x; A, B and the bias are constants.

    Args:
        weight: Ŵ (`repack_weight`).
        factors: A and B, repacked here if they are not (`repack_factors`); None for none.
        bias: of length out.
        off: what is not to be used (`dispatch.switched_off`).
        name: the module's, for messages.

    Raises:
        LayoutError: when factors or bias do not fit the weight.
    """

    def __init__(
        self,
        weight: RepackedWeight,
        factors: Factors | RepackedFactors | None = None,
        bias: torch.Tensor | None = None,
        off: frozenset[str] = frozenset(),
        name: str = "layer",
    ) -> None:
        repacked = repack_factors(factors) if isinstance(factors, Factors) else factors
        self.cpu = CpuLinear(weight, repacked, bias, name)
        self._alone = CpuLinears([self.cpu])
        self._off = off
        self._choices: dict[tuple[torch.dtype, bool], Choice] = {}

    def choice(self, dtype: torch.dtype, rows: int) -> Choice:
        """The kernel for x of this dtype and so many rows."""
        key = (dtype, rows <= FEW_ROWS)
        if key not in self._choices:
            self._choices[key] = choose("cpu", dtype, self.cpu.weight.bits, rows, self._off)
        return self._choices[key]

    def __call__(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """y, rows × out in x's dtype, of x, rows × in.

        Args:
            x: rows × in.
            weights: rows × members of the factors, float32, contiguous; None weighs all components by 1.

        Raises:
            ValueError: for an x of another width, another device, or a dtype that no kernel takes.
        """
        if x.requires_grad and torch.is_grad_enabled():
            return _Differentiable.apply(x, self, weights)
        return self.multiply(x, weights)

    def multiply(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """y without a gradient."""
        return self.multiply_all(x, self._alone, weights)

    def multiply_all(
        self, x: torch.Tensor, layers: CpuLinears, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """y of the layers that read what this one reads, side by side, by the kernel that serves this one."""
        if x.ndim != 2 or x.shape[1] != self.cpu.in_features or not x.is_cpu:
            raise ValueError(
                f"x should be rows × {self.cpu.in_features} on the CPU, got {tuple(x.shape)} on {x.device}."
            )
        choice = self.choice(x.dtype, x.shape[0])  # len(x) takes four times as long
        if choice.path == TORCH:
            raise ValueError(f"No kernel can be used: {choice.reason}.")
        x = x.contiguous()
        if choice.path == MATMUL:
            return layers.matmul(x, weights)
        product = layers.codes if choice.path == CODES else layers.tiles
        return product(x, choice.isa, weights)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Ŵᵀ, in × out, rounded once to ``dtype``: for who multiplies many rows by it, there and back."""
        weight = torch.empty(self.cpu.in_features, self.cpu.out_features, dtype=dtype)
        for begin, end, tile in self.cpu.dequantized(self.choice(torch.float32, 1).isa):
            weight[:, begin:end] = tile
        return weight

    def transposed(self, grad: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """grad (Ŵ + B G A), G the weights of a row: the gradient by x of a gradient by y, rows × in.

        Ŵ is dequantised whole for it, to bfloat16 for a gradient in bfloat16, which takes a third to a half of the time
        of a product in float32. For other dtypes to float32: torch multiplies float16 on a CPU far more slowly.
        """
        dtype = torch.bfloat16 if grad.dtype == torch.bfloat16 else torch.float32
        result = (grad.to(dtype) @ self.dense(dtype).T).to(torch.float32)
        if self.cpu.factors is not None:
            down, up = unpack_factors(self.cpu.factors).dense()
            result.addmm_(weighed(grad.to(torch.float32) @ up.T, self.cpu.factors.members, weights), down)
        return result.to(grad.dtype)


class JointLinears:
    """Layers that read the same input, multiplied in one go; without gradients.

    Args:
        layers: of equal inputs, in the same order and groups.

    Raises:
        LayoutError: for others.
    """

    def __init__(self, layers: Sequence[FusedLinear]) -> None:
        self._first = layers[0]
        self._joint = CpuLinears([layer.cpu for layer in layers])

    def __call__(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> Sequence[torch.Tensor]:
        """y of each layer, views of what `joined` gives."""
        return self.joined(x, weights).split(self._joint.widths, dim=1)

    def joined(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """y of the layers side by side, rows × all outputs in x's dtype, of x, rows × in, with weights as `FusedLinear`
        takes them.

        Raises:
            ValueError: as `FusedLinear`.
        """
        return self._first.multiply_all(x, self._joint, weights)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FusedLinear, weights: torch.Tensor | None) -> torch.Tensor:
        ctx.layer, ctx.weights = layer, weights
        return layer.multiply(x, weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.layer.transposed(grads[0], ctx.weights), None, None
