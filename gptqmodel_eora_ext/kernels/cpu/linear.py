"""y = x Ŵᵀ + (x Aᵀ) Bᵀ + bias on the CPU, straight from packed weights for few rows, by tiles of Ŵ for many."""

from __future__ import annotations

import ctypes

import torch

from .build import library
from .repack import KINDS, LANES, RepackedFactors, RepackedWeight

# Outputs of Ŵ that are dequantised at a time.
TILE_OUTPUTS = 512


class _Linear(ctypes.Structure):
    """`struct Linear` of csrc/linear.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("bits", "in_features", "out_features", "rank", "segments", "units",
                                              "strips", "zero", "scale_kind", "down_kind", "up_kind", "padding")),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "starts", "order", "down", "down_scales",
                                               "up", "up_scales", "bias")),
    ]  # fmt: skip


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class CpuLinear:
    """A linear layer ready to be multiplied with.

    Args:
        weight: Ŵ; None for factors alone, which can only be asked for `down`.
        factors: A and B; None for none.
        bias: of length out.
    """

    def __init__(
        self,
        weight: RepackedWeight | None,
        factors: RepackedFactors | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        kernels = library()
        assert kernels is not None
        self._kernels = kernels
        self.weight, self.factors = weight, factors
        shape = weight or factors
        assert shape is not None
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self.bias = None
        if bias is not None:
            strips = -(-self.out_features // LANES)
            self.bias = torch.zeros(strips * LANES, dtype=torch.float32)
            self.bias[: self.out_features] = bias.detach()
        self._struct = _Linear(in_features=self.in_features, out_features=self.out_features, bias=_pointer(self.bias))
        if weight is not None:
            self._set(weight, "bits", "segments", "units", "strips", "zero", "codes", "scales", "zeros", "starts",
                      "order")  # fmt: skip
            self._struct.scale_kind = KINDS[weight.scales.dtype]
        if factors is not None:
            self._set(factors, "rank", "down", "down_scales", "down_kind", "up", "up_scales", "up_kind")
        self._address = ctypes.addressof(self._struct)

    def _set(self, source: object, *names: str) -> None:
        for name in names:
            value = getattr(source, name)
            setattr(self._struct, name, value if isinstance(value, int) else _pointer(value))

    @property
    def rank(self) -> int:
        return self.factors.rank if self.factors else 0

    def few_rows(self, x: torch.Tensor, t: torch.Tensor | None, isa: int) -> torch.Tensor:
        """y, from the packed codes.

        Args:
            x: rows × in, contiguous, float32, float16 or bfloat16.
            t: x Aᵀ in float32, rows × anything wider, where it is known.
            isa: index into `build.ISAS`.

        Returns:
            rows × out, in x's dtype.
        """
        y = torch.empty(x.shape[0], self.out_features, dtype=x.dtype)
        given, stride = (None, 0) if t is None else (t.data_ptr(), t.stride(0))
        self._kernels.eora_linear(self._address, x.data_ptr(), KINDS[x.dtype], x.shape[0], y.data_ptr(), given, stride,
                                  isa, torch.get_num_threads())  # fmt: skip
        return y

    def down(self, x: torch.Tensor, isa: int) -> torch.Tensor:
        """t = x Aᵀ, rows × rank in float32, for few rows."""
        t = torch.empty(x.shape[0], self.rank, dtype=torch.float32)
        self._kernels.eora_down(self._address, x.data_ptr(), KINDS[x.dtype], x.shape[0], t.data_ptr(), self.rank, isa,
                                torch.get_num_threads())  # fmt: skip
        return t

    def many_rows_bf16(self, x: torch.Tensor) -> torch.Tensor:
        """y of many rows of bfloat16, contiguous, where the processor multiplies bfloat16 by itself."""
        t = None
        if self.factors is not None:
            t = torch.nn.functional.linear(x, self.factors.source.dense(x.dtype)[0])
        y = torch.empty(x.shape[0], self.out_features, dtype=x.dtype)
        self._kernels.eora_matmul(self._address, x.data_ptr(), _pointer(t), x.shape[0], y.data_ptr(),
                                  torch.get_num_threads())  # fmt: skip
        return y

    def many_rows(self, x: torch.Tensor, isa: int) -> torch.Tensor:
        """y by matrix multiplication with tiles of Ŵᵀ, under which Bᵀ lies: [x, x Aᵀ] [Ŵᵀ; Bᵀ].

        x is rows × in. Products are of x's dtype, except that float16 is multiplied in float32.
        """
        assert self.weight is not None
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        wide = x.to(dtype)
        if self.factors is not None:
            down, up = self.factors.source.dense(dtype)
            wide = torch.cat([wide, wide @ down.T], dim=1)
        y = torch.empty(x.shape[0], self.out_features, dtype=x.dtype)
        tile = torch.empty(wide.shape[1], min(TILE_OUTPUTS, self.weight.strips * LANES), dtype=dtype)
        for begin in range(0, self.out_features, TILE_OUTPUTS):
            end = min(begin + TILE_OUTPUTS, self.out_features)
            first, last = begin // LANES, -(-end // LANES)
            self._kernels.eora_dequantize(self._address, first, last, tile.data_ptr(), KINDS[dtype], tile.shape[1],
                                          isa, torch.get_num_threads())  # fmt: skip
            if self.factors is not None:
                tile[self.in_features :, : end - begin] = up[:, begin:end]
            product = wide @ tile[:, : end - begin]
            y[:, begin:end] = product if self.bias is None else product + self.bias[begin:end]
        return y
