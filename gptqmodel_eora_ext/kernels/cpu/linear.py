"""y = x Ŵᵀ + (x Aᵀ) Bᵀ + bias on the CPU, straight from packed weights for few rows, by tiles of Ŵ for many."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch

from ...formats.factors import to_dense
from ...formats.packed_weights import LayoutError
from .build import library, require_fine
from .repack import KINDS, LANES, RepackedFactors, RepackedWeight, unpack_down, unpack_factors

# Outputs of Ŵ that are dequantised at a time.
TILE_OUTPUTS = 512
# Rows taken at a time, which bounds the memory that a thread keeps: 22 MB at 12,288 inputs in float32, and 25 MB. A
# strip's codes, and the dequantised Ŵᵀ, serve enough rows then; the second is a multiple of csrc's blocks of 12.
CODES_ROWS = 256
MATMUL_ROWS = 1020


_MEMORY = ("codes", "scales", "zeros", "starts", "order", "down", "down_scales", "up", "up_scales", "bias")


class _Linear(ctypes.Structure):
    """`struct Linear` of csrc/linear.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("bits", "in_features", "out_features", "rank", "segments", "units",
                                              "strips", "zero", "scale_kind", "down_kind", "up_kind", "padding")),
        *((name, ctypes.c_void_p) for name in _MEMORY),
        *((f"{name}_bytes", ctypes.c_int64) for name in _MEMORY),
    ]  # fmt: skip


def _memory(tensor: torch.Tensor | None) -> tuple[int | None, int]:
    """A contiguous tensor's address and bytes."""
    return (None, 0) if tensor is None else (tensor.data_ptr(), tensor.nbytes)


class CpuLinear:
    """A linear layer ready to be multiplied with.

    Args:
        weight: Ŵ.
        factors: A and B; None for none.
        bias: of length out.
        name: the module's, for messages.

    Raises:
        LayoutError: when factors or bias do not fit the weight.
    """

    def __init__(
        self,
        weight: RepackedWeight,
        factors: RepackedFactors | None = None,
        bias: torch.Tensor | None = None,
        name: str = "layer",
    ) -> None:
        _check_fit(weight, factors, bias, name)
        kernels = library()
        assert kernels is not None
        self.kernels, self.name = kernels, name
        self.weight, self.factors = weight, factors
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bias = None
        if bias is not None:
            self.bias = torch.zeros(weight.strips * LANES, dtype=torch.float32)
            self.bias[: self.out_features] = bias.detach()
        self._struct = _Linear(in_features=self.in_features, out_features=self.out_features)
        self._set(self, "bias")
        self._set(weight, "bits", "segments", "units", "strips", "zero", "codes", "scales", "zeros", "starts", "order")
        self._struct.scale_kind = KINDS[weight.scales.dtype]
        if factors is not None:
            self._set(factors, "rank", "down", "down_scales", "down_kind", "up", "up_scales", "up_kind")
        self.address = ctypes.addressof(self._struct)
        require_fine(kernels.eora_check(self.address), name)

    def _set(self, source: object, *names: str) -> None:
        for name in names:
            value = getattr(source, name)
            if isinstance(value, int):
                setattr(self._struct, name, value)
            else:
                pointer, nbytes = _memory(value)
                setattr(self._struct, name, pointer)
                setattr(self._struct, f"{name}_bytes", nbytes)

    def tiles(self, x: torch.Tensor, isa: int) -> torch.Tensor:
        """y by torch's matrix multiplication in float32 with tiles of Ŵᵀ, under which Bᵀ lies: [x, x Aᵀ] [Ŵᵀ; Bᵀ]."""
        wide = x.to(torch.float32)
        if self.factors is not None:
            down, up = unpack_factors(self.factors).dense()
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
            require_fine(
                self.kernels.eora_dequantize(self.address, begin // LANES, -(-end // LANES), *_memory(tile), width, isa,
                                             torch.get_num_threads()),
                self.name,
            )  # fmt: skip
            yield begin, end, tile[:, : end - begin]


def _check_fit(weight: RepackedWeight, factors: RepackedFactors | None, bias: torch.Tensor | None, name: str) -> None:
    shape = (weight.out_features, weight.in_features)
    if factors is not None and (factors.out_features, factors.in_features) != shape:
        raise LayoutError(
            f"{name}: factors are for out × in = {factors.out_features} × {factors.in_features}, the weight is "
            f"{shape[0]} × {shape[1]}. The adapter was made for another model."
        )
    if bias is not None and tuple(bias.shape) != shape[:1]:
        raise LayoutError(f"{name}: the bias should have length {shape[0]}, found {list(bias.shape)}. The checkpoint "
                          f"is damaged.")  # fmt: skip


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
        self._widths = [layer.out_features for layer in layers]
        self._run = layers[0].kernels.eora_linears

    def codes(self, x: torch.Tensor, isa: int) -> list[torch.Tensor]:
        """y of each layer, straight from the packed codes.

        Args:
            x: rows × in, contiguous, float32, float16 or bfloat16.
            isa: index into `build.ISAS`.

        Returns:
            rows × out each, in x's dtype. x is rounded to some 2^-15 (float32: 2^-23) of its group's largest at most.
        """
        rows, dtype = x.shape[0], x.dtype
        ys = [torch.empty(rows, width, dtype=dtype) for width in self._widths]
        if rows <= CODES_ROWS:
            # The usual call, which waits for nothing that is not needed.
            self._codes(x, ys, rows, KINDS[dtype], isa)
            return ys
        for begin in range(0, rows, CODES_ROWS):
            part = x[begin : begin + CODES_ROWS]
            self._codes(part, [y[begin : begin + CODES_ROWS] for y in ys], len(part), KINDS[dtype], isa)
        return ys

    def _codes(self, x: torch.Tensor, ys: list[torch.Tensor], rows: int, kind: int, isa: int) -> None:
        fault = self._run(
            self._addresses, len(ys), x.data_ptr(), x.nbytes, kind, rows, self._pointers(*[y.data_ptr() for y in ys]),
            sum([y.nbytes for y in ys]), isa, torch.get_num_threads(),
        )  # fmt: skip
        if fault:
            require_fine(fault, self._layers[0].name)

    def matmul(self, x: torch.Tensor) -> list[torch.Tensor]:
        """y of each layer for many rows of bfloat16, contiguous, on a processor that multiplies bfloat16; Ŵ, A, B and
        x Aᵀ are rounded to bfloat16, sums are float32."""
        ys = [torch.empty(x.shape[0], layer.out_features, dtype=x.dtype) for layer in self._layers]
        ranks = [0 if layer.factors is None else layer.factors.rank for layer in self._layers]
        downs = [to_dense(unpack_down(layer.factors), x.dtype) for layer in self._layers if layer.factors is not None]
        down = torch.cat(downs) if downs else None
        for begin in range(0, x.shape[0], MATMUL_ROWS):
            rows = x[begin : begin + MATMUL_ROWS]
            ts = [None] * len(ys) if down is None else torch.nn.functional.linear(rows, down).split(ranks, dim=1)
            for layer, t, y in zip(self._layers, ts, ys, strict=True):
                own = t.contiguous() if t is not None else None
                fault = layer.kernels.eora_matmul(layer.address, *_memory(rows), *_memory(own), len(rows),
                                                  *_memory(y[begin : begin + len(rows)]),
                                                  torch.get_num_threads())  # fmt: skip
                require_fine(fault, layer.name)
        return ys

    def tiles(self, x: torch.Tensor, isa: int) -> list[torch.Tensor]:
        """As `CpuLinear.tiles`, of each layer."""
        return [layer.tiles(x, isa) for layer in self._layers]
