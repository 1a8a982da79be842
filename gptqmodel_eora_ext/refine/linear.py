"""A linear layer whose factors learn and whose weight does not: y = x Ŵᵀ + (x Aᵀ) Bᵀ + bias."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class FrozenWeight(Protocol):
    """A quantised weight as a host has it.

    Attributes:
        in_features: inputs.
        out_features: outputs.
        bias: of length out, or None.
    """

    in_features: int
    out_features: int
    bias: torch.Tensor | None

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Ŵᵀ, in × out, with any strides, in ``dtype`` and on the device of the weight; made anew by each call."""
        ...


class TrainedLinear(torch.nn.Module):
    """Takes a quantised layer's place while its factors are trained.

    Ŵ is dequantised for a call and let go after it: for the 512 rows of a window the product with a dense matrix takes
    less time than one from packed codes, and dequantising is a small part of it (docs/refinement.md).

    Args:
        weight: Ŵ.
        factors: A (rank × in or more) and Bᵀ (rank × out or more), of which what is beyond is not used: leaves of
            autograd in the dtype of the activations. None for none.
        along_rank: whether the second is B (out × rank or more) in place of Bᵀ.
    """

    def __init__(
        self, weight: FrozenWeight, factors: tuple[torch.Tensor, torch.Tensor] | None, *, along_rank: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight_source, self.factors, self.along_rank = weight, factors, along_rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y, … × out, of x, … × in."""
        rows = x.reshape(-1, self.in_features)
        y: torch.Tensor = _FrozenProduct.apply(rows, self.weight_source)
        if self.factors is not None:
            down, up = self.factors[0], self.factors[1].T if self.along_rank else self.factors[1]
            y = torch.addmm(y, rows @ down[:, : self.in_features].T, up[: len(down), : self.out_features])
        if self.weight_source.bias is not None:
            y = y + self.weight_source.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)


class _FrozenProduct(torch.autograd.Function):
    """x Ŵᵀ, whose gradient by x is grad Ŵ.

    Ŵᵀ is saved by `save_for_backward`, not beside it: only so does `torch.utils.checkpoint` drop it after the first
    forward, and have it made again with the layer's activations.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: FrozenWeight) -> torch.Tensor:
        dense = weight.dense(x.dtype)
        ctx.save_for_backward(dense)
        return x @ dense

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        (dense,) = ctx.saved_tensors
        return (grads[0] @ dense.T if ctx.needs_input_grad[0] else None), None
