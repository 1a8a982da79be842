"""y = x Ŵᵀ + (x Aᵀ) Bᵀ + bias on the CPU, straight from packed weights for few rows, by tiles of Ŵ for many."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch

from ...formats.factors import to_dense
from ...formats.packed_weights import LayoutError
from .build import library
from .repack import KINDS, LANES, RepackedFactors, RepackedWeight

# Outputs of Ŵ that are dequantised at a time.
TILE_OUTPUTS = 512
# Rows taken at a time, which bounds the memory that a thread keeps: 22 MB at 12,288 inputs in float32, and 25 MB. A
# strip's codes, and the dequantised Ŵᵀ, serve enough rows then; the second is a multiple of csrc's blocks of 12.
CODES_ROWS = 256
MATMUL_ROWS = 1020


class _Linear(ctypes.Structure):
    """`struct Linear` of csrc/linear.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("bits", "in_features", "out_features", "rank", "segments", "units",
                                              "strips", "zero", "scale_kind", "down_kind", "up_kind", "unused")),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "starts", "order", "down", "down_scales",
                                               "up", "up_scales", "bias")),
    ]  # fmt: skip


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class CpuLinear:
    """A linear layer ready to be multiplied with.

    Args:
        weight: Ŵ.
        factors: A and B; None for none.
        bias: of length out.
    """

    def __init__(
        self,
        weight: RepackedWeight,
        factors: RepackedFactors | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        kernels = library()
        assert kernels is not None
        self.kernels = kernels
        self.weight, self.factors = weight, factors
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bias = None
        if bias is not None:
            self.bias = torch.zeros(weight.strips * LANES, dtype=torch.float32)
            self.bias[: self.out_features] = bias.detach()
        self._struct = _Linear(in_features=self.in_features, out_features=self.out_features, bias=_pointer(self.bias))
        self._set(weight, "bits", "segments", "units", "strips", "zero", "codes", "scales", "zeros", "starts", "order")
        self._struct.scale_kind = KINDS[weight.scales.dtype]
        if factors is not None:
            self._set(factors, "rank", "down", "down_scales", "down_kind", "up", "up_scales", "up_kind")
        self.address = ctypes.addressof(self._struct)

    def _set(self, source: object, *names: str) -> None:
        for name in names:
            value = getattr(source, name)
            setattr(self._struct, name, value if isinstance(value, int) else _pointer(value))

    def tiles(self, x: torch.Tensor, isa: int) -> torch.Tensor:
        """y by torch's matrix multiplication in float32 with tiles of Ŵᵀ, under which Bᵀ lies: [x, x Aᵀ] [Ŵᵀ; Bᵀ]."""
        wide = x.to(torch.float32)
        if self.factors is not None:
            down, up = self.factors.source.dense()
            wide = torch.cat([wide, wide @ down.T], dim=1)
        y = torch.empty(x.shape[0], self.out_features, dtype=x.dtype)
        for begin, end, tile in self.dequantized(isa, extra_rows=wide.shape[1] - self.in_features):
            if self.factors is not None:
                tile[self.in_features :] = up[:, begin:end]
            product = wide @ tile
            y[:, begin:end] = product if self.bias is None else product + self.bias[begin:end]
        return y

    def dequantized(self, isa: int, extra_rows: int = 0) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(begin, end, Ŵᵀ of these outputs) in float32, in + extra_rows × outputs; the next one overwrites it."""
        width = min(TILE_OUTPUTS, self.weight.strips * LANES)
        tile = torch.empty(self.in_features + extra_rows, width, dtype=torch.float32)
        for begin in range(0, self.out_features, width):
            end = min(begin + width, self.out_features)
            self.kernels.eora_dequantize(self.address, begin // LANES, -(-end // LANES), tile.data_ptr(), width, isa,
                                         torch.get_num_threads())  # fmt: skip
            yield begin, end, tile[:, : end - begin]


class CpuLinears:
    """Layers that read the same x: it is turned into integers once, and multiplied with all their A in one go.

    Args:
        layers: of equal inputs, in the same order and groups.

    Raises:
        LayoutError: for others.
    """

    def __init__(self, layers: Sequence[CpuLinear]) -> None:
        first = layers[0].weight
        if not all(layer.weight.reads_as(first) for layer in layers[1:]):
            raise LayoutError("layers that are to share an input differ in its order or its groups.")
        self._layers = tuple(layers)
        self._pointers = ctypes.c_void_p * len(layers)
        self._addresses = self._pointers(*(layer.address for layer in layers))

    def codes(self, x: torch.Tensor, isa: int) -> list[torch.Tensor]:
        """y of each layer, straight from the packed codes.

        Args:
            x: rows × in, contiguous, float32, float16 or bfloat16.
            isa: index into `build.ISAS`.

        Returns:
            rows × out each, in x's dtype. x is rounded to some 2^-15 (float32: 2^-23) of its group's largest at most.
        """
        rows, width = x.shape
        kernels, threads, kind = self._layers[0].kernels, torch.get_num_threads(), KINDS[x.dtype]
        ys = [torch.empty(rows, layer.out_features, dtype=x.dtype) for layer in self._layers]
        for begin in range(0, rows, CODES_ROWS):
            offset = begin * x.element_size()
            kernels.eora_linears(self._addresses, len(ys), x.data_ptr() + offset * width, kind,
                                 min(rows - begin, CODES_ROWS),
                                 self._pointers(*(y.data_ptr() + offset * y.shape[1] for y in ys)),
                                 isa, threads)  # fmt: skip
        return ys

    def matmul(self, x: torch.Tensor) -> list[torch.Tensor]:
        """y of each layer for many rows of bfloat16, contiguous, on a processor that multiplies bfloat16; Ŵ, A, B and
        x Aᵀ are rounded to bfloat16, sums are float32."""
        ys = [torch.empty(x.shape[0], layer.out_features, dtype=x.dtype) for layer in self._layers]
        ranks = [0 if layer.factors is None else layer.factors.rank for layer in self._layers]
        downs = [to_dense(layer.factors.source.down, x.dtype) for layer in self._layers if layer.factors is not None]
        down = torch.cat(downs) if downs else None
        for begin in range(0, x.shape[0], MATMUL_ROWS):
            rows = x[begin : begin + MATMUL_ROWS]
            ts = [None] * len(ys) if down is None else torch.nn.functional.linear(rows, down).split(ranks, dim=1)
            for layer, t, y in zip(self._layers, ts, ys, strict=True):
                own = t.contiguous() if t is not None else None
                layer.kernels.eora_matmul(layer.address, rows.data_ptr(), _pointer(own), rows.shape[0],
                                          y[begin:].data_ptr(), torch.get_num_threads())  # fmt: skip
        return ys

    def tiles(self, x: torch.Tensor, isa: int) -> list[torch.Tensor]:
        """As `CpuLinear.tiles`, of each layer."""
        return [layer.tiles(x, isa) for layer in self._layers]
