"""y = x Ŵᵀ + ((x Aᵀ) ∘ g) Bᵀ + bias on the CPU, straight from packed weights for few rows, by tiles of Ŵ for many."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ...formats.factors import to_dense
from ...formats.packed_weights import LayoutError
from .build import ISAS, library, require_fine
from .factors import INTEGER_KINDS, RepackedFactors, unpack_down, unpack_factors
from .repack import KINDS, LANES, RepackedWeight

# Outputs of Ŵ that are dequantised at a time.
TILE_OUTPUTS = 512
# Rows taken at a time, which bounds the memory that a thread keeps: 22 MB at 12,288 inputs in float32, and 25 MB. A
# strip's codes, and the dequantised Ŵᵀ, serve enough rows then; the second is a multiple of csrc's blocks of 12.
CODES_ROWS = 256
MATMUL_ROWS = 1020


_MEMORY = ("codes", "scales", "zeros", "starts", "order", "down", "down_scales", "up", "up_scales", "bias", "ends")


class _Linear(ctypes.Structure):
    """`struct Linear` of csrc/linear.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("bits", "in_features", "out_features", "rank", "segments", "units",
                                              "strips", "zero", "scale_kind", "down_kind", "up_kind", "members")),
        *((name, ctypes.c_void_p) for name in _MEMORY),
        *((f"{name}_bytes", ctypes.c_int64) for name in _MEMORY),
    ]  # fmt: skip


class _Read(NamedTuple):
    """What a call reads of a layer's factors.

    Attributes:
        factors: the layer's.
        components: which ones; None for all.
        members: how many of them each member that is read has.
        weights: rows × members of those that are read; None weighs all by 1.
    """

    factors: RepackedFactors
    components: torch.Tensor | None
    members: tuple[int, ...]
    weights: torch.Tensor | None

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The components that are read of values that stand component by component."""
        return values if self.components is None else values[self.components]


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
            if factors.members:
                self.ends = torch.tensor(list(itertools.accumulate(factors.members)), dtype=torch.int32)
                self._struct.members = len(factors.members)
                self._set(self, "ends")
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

    def tiles(self, x: torch.Tensor, y: torch.Tensor, isa: int, weights: torch.Tensor | None = None) -> None:
        """y by torch's matrix multiplication in float32 with tiles of Ŵᵀ, under which Bᵀ lies: [x, x Aᵀ] [Ŵᵀ; Bᵀ]."""
        wide = x.to(torch.float32)
        read = self._read_of(weights)
        if read is not None:
            down, up = (read.of(factor) for factor in unpack_factors(read.factors).dense())
            wide = torch.cat([wide, weighed(wide @ down.T, read.members, read.weights)], dim=1)
        for begin, end, tile in self.dequantized(isa, extra_rows=wide.shape[1] - self.in_features):
            if read is not None:
                tile[self.in_features :] = up[:, begin:end]
            product = wide @ tile
            y[:, begin:end] = product if self.bias is None else product + self.bias[begin:end]

    def _read_of(self, weights: torch.Tensor | None) -> _Read | None:
        """What a call with these weights, rows × members, reads of the factors; None for nothing."""
        factors = self.factors
        if factors is None:
            return None
        if weights is None or not factors.members:
            return _Read(factors, None, (factors.rank,), None)
        live = (weights != 0).any(dim=0)
        read = [member for member, rank in enumerate(factors.members) if rank and live[member]]
        if not read:
            return None
        if len(read) == len(factors.members):
            return _Read(factors, None, factors.members, weights)
        ends = list(itertools.accumulate(factors.members))
        components = torch.cat([torch.arange(ends[one] - factors.members[one], ends[one]) for one in read])
        return _Read(factors, components, tuple(factors.members[one] for one in read), weights[:, read])

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


def weighed(t: torch.Tensor, members: Sequence[int], weights: torch.Tensor | None) -> torch.Tensor:
    """x Aᵀ, rows × rank, with each member's components multiplied by its weights, rows × members; None for none."""
    if weights is None:
        return t
    each = weights.repeat_interleave(torch.tensor(members), dim=1, output_size=t.shape[1])
    return (t * each).to(t.dtype)


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

    Attributes:
        widths: the outputs of each layer, which stand side by side in y.

    Raises:
        LayoutError: for others.
    """

    def __init__(self, layers: Sequence[CpuLinear]) -> None:
        first = layers[0].weight
        if not all(layer.weight.reads_as(first) for layer in layers[1:]):
            raise LayoutError("layers that are to share an input differ in its order or its groups.")
        self._layers = tuple(layers)
        self._addresses = (ctypes.c_void_p * len(layers))(*(layer.address for layer in layers))
        self.widths = [layer.out_features for layer in layers]
        self._out_features = sum(self.widths)
        self._run = layers[0].kernels.eora_linears
        self._given: tuple[torch.Tensor | None, int | None, int] = (None, None, 0)

    def codes(self, x: torch.Tensor, isa: int, weights: torch.Tensor | None = None) -> torch.Tensor:
        """y, straight from the packed codes.

        Args:
            x: rows × in, contiguous, float32, float16 or bfloat16.
            isa: index into `build.ISAS`.
            weights: rows × members of each layer's factors, float32, contiguous; None weighs all components by 1.

        Returns:
            rows × all outputs, in x's dtype. x is rounded to some 2^-15 (float32: 2^-23) of its group's largest at
            most.
        """
        rows, dtype = x.shape[0], x.dtype
        y = torch.empty(rows, self._out_features, dtype=dtype)
        if rows <= CODES_ROWS:
            # The usual call, which waits for nothing that is not needed.
            self._codes(x, y, rows, KINDS[dtype], isa, weights)
            return y
        for begin in range(0, rows, CODES_ROWS):
            part = x[begin : begin + CODES_ROWS]
            own = None if weights is None else weights[begin : begin + CODES_ROWS]
            self._codes(part, y[begin : begin + CODES_ROWS], len(part), KINDS[dtype], isa, own)
        return y

    def _codes(
        self, x: torch.Tensor, y: torch.Tensor, rows: int, kind: int, isa: int, weights: torch.Tensor | None
    ) -> None:
        given = self._given
        if given[0] is not weights:
            # Token after token has the same weights; to ask a tensor where it lies takes a hundredth of a small call.
            given = self._given = (weights, *_memory(weights))
        fault = self._run(self._addresses, len(self._layers), x.data_ptr(), x.nbytes, kind, rows, given[1], given[2],
                          y.data_ptr(), y.nbytes, isa, torch.get_num_threads())  # fmt: skip
        if fault:
            require_fine(fault, self._layers[0].name)

    def matmul(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """y, as `codes`, of many rows of bfloat16, contiguous, on a processor that multiplies bfloat16; Ŵ, A, B and
        x Aᵀ are rounded to bfloat16, sums are float32."""
        y = torch.empty(x.shape[0], self._out_features, dtype=x.dtype)
        read = [layer._read_of(weights) for layer in self._layers]
        components = self._components(read, x.dtype)
        live_members = None if weights is None else (weights != 0).any(dim=0).to(torch.float32)
        for begin in range(0, x.shape[0], MATMUL_ROWS):
            rows = x[begin : begin + MATMUL_ROWS]
            ys = y[begin : begin + len(rows)].split(self.widths, dim=1)
            for layer, one, t, part in zip(self._layers, read, components(rows), ys, strict=True):
                own = None
                if t is not None and one is not None:
                    live = None if one.weights is None else one.weights[begin : begin + MATMUL_ROWS]
                    own = weighed(t, one.members, live).to(x.dtype).contiguous()
                # From the part's first value to its last; between its rows lie those of the other layers.
                spanned = ((len(rows) - 1) * self._out_features + layer.out_features) * y.element_size()
                fault = layer.kernels.eora_matmul(layer.address, *_memory(rows), *_memory(own), len(rows),
                                                  *_memory(live_members), part.data_ptr(), spanned, self._out_features,
                                                  torch.get_num_threads())  # fmt: skip
                require_fine(fault, layer.name)
        return y

    def _components(
        self, read: Sequence[_Read | None], dtype: torch.dtype
    ) -> Callable[[torch.Tensor], Sequence[torch.Tensor | None]]:
        """What gives each layer's x Aᵀ, rows × the components that are read, of x; None for a layer without any.

        A of 4 bits is multiplied as it lies in memory: to unpack it at every call takes as long again as all that the
        adapter adds to 256 rows. Others are multiplied by torch in ``dtype``.
        """
        if {one.factors.down_kind for one in read if one is not None} == {INTEGER_KINDS[4]}:
            return lambda x: [None if one is None else one.of(t.T).T
                              for one, t in zip(read, self._components_of_codes(x), strict=True)]  # fmt: skip
        downs = [None if one is None else one.of(to_dense(unpack_down(one.factors), dtype)) for one in read]
        some = [down for down in downs if down is not None]
        if not some:
            return lambda x: [None] * len(read)
        down, ranks = torch.cat(some), [0 if one is None else len(one) for one in downs]
        return lambda x: torch.nn.functional.linear(x, down).split(ranks, dim=1)

    def _components_of_codes(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Each layer's x Aᵀ in float32, rows × rank, of A of 4 bits."""
        ranks = [0 if layer.factors is None else layer.factors.rank for layer in self._layers]
        found = []
        for rows in x.split(CODES_ROWS):
            t = torch.empty(sum(ranks) * len(rows))
            fault = self._layers[0].kernels.eora_components(
                self._addresses, len(self._layers), *_memory(rows), KINDS[x.dtype], len(rows), *_memory(t),
                ISAS.index("avx512-bf16"), torch.get_num_threads(),
            )  # fmt: skip
            require_fine(fault, self._layers[0].name)
            of_layers = t.split([rank * len(rows) for rank in ranks])
            found.append([one.view(len(rows), rank) for one, rank in zip(of_layers, ranks, strict=True)])
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def tiles(self, x: torch.Tensor, isa: int, weights: torch.Tensor | None = None) -> torch.Tensor:
        """y, as `CpuLinear.tiles` computes each layer's."""
        y = torch.empty(x.shape[0], self._out_features, dtype=x.dtype)
        for layer, part in zip(self._layers, y.split(self.widths, dim=1), strict=True):
            layer.tiles(x, part, isa, weights)
        return y
