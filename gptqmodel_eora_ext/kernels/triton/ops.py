"""Weights and adapters of modules that read the same input, multiplied on a GPU: what dispatch and hosts call.

Triton's kernels, or NVIDIA's compiled ones where they are asked for and read the weights (`kernels.cuda`). To a
compiler it is one operator with a fake implementation: `torch.compile` sees one node, and CUDA-graph capture meets no
synchronisation and no allocation whose size depends on data. It has no backward; training takes the torch path.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from ...formats.factors import GROUP_SIZE, Factors, QuantizedFactor
from ...formats.packed_weights import LayoutError, PackedWeight, pack_words
from ..cuda.prepare import compiled
from ..devices import UNCOMPILED, aligned, on, processors, traced
from ..row_weights import member_of
from . import settings
from .dense import factor_kernel
from .dequantized import dequantized
from .gemm import gemm_kernel
from .gemv import gemv_kernel
from .launch import Known, launch
from .shrink import shrink_kernel

if TYPE_CHECKING:
    from ..cuda.prepare import Compiled

# Fields of `StackedLinears` that the traced operator does not take.
UNTRACED = ("in_features", "members", "member_of", "compiled", "launches")
# What was prepared, by its key, as long as somebody holds it.
_prepared: WeakValueDictionary[int, StackedLinears] = WeakValueDictionary()
_keys = itertools.count(1)
# A tile of locks that the shrink kernel zeroes at a time.
LOCKS = 1024
# 1.0 as float32 (`codes.mantissa`).
ONE = 0x3F800000


@dataclass(frozen=True)
class StackedLinears:
    """Weights that read the same input, as `fused_linears` takes them; tensors of a weight are its own, not copies.

    Attributes:
        qweights, scales: of `PackedWeight`.
        qzeros: of version 2; None for a weight whose zeros all are 2^(bits − 1).
        g_idx: int32; None for inputs in the order of their groups.
        biases: each of length out, or None.
        down: A of all modules, stacked: Σ ranks × in (codes, if packed); None without any adapter.
        down_scales: scales of ``down``, if packed.
        ups: Bᵀ of each module, or its codes; None for a module without adapter.
        up_scales: scales of ``ups``, if packed.
        bits, group_size, factor_bits: of all modules alike; factor_bits 16 for floating factors.
        in_features: inputs.
        members: how many an ensemble has; 0 for adapters of their own.
        member_of: int32, the member that each component of ``down`` belongs to; None without members.
        compiled: NVIDIA's compiled kernels over the same tensors; None where Triton's serve.
        key: by which the operator finds what was prepared.
        launches: what was launched before.
    """

    qweights: list[torch.Tensor]
    qzeros: list[torch.Tensor | None]
    scales: list[torch.Tensor]
    g_idx: list[torch.Tensor | None]
    biases: list[torch.Tensor | None]
    down: torch.Tensor | None
    down_scales: torch.Tensor | None
    ups: list[torch.Tensor | None]
    up_scales: list[torch.Tensor | None]
    bits: int
    group_size: int
    factor_bits: int
    in_features: int
    members: int = 0
    member_of: torch.Tensor | None = None
    compiled: Compiled | None = field(default=None, repr=False, compare=False)
    key: int = 0
    launches: Known = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def prepare(
        cls,
        weights: Sequence[PackedWeight],
        factors: Sequence[Factors | None],
        biases: Sequence[torch.Tensor | None],
    ) -> StackedLinears:
        """Bring weights into the form of the kernels: zeros to version 2, A stacked. Synchronises; meant for loading.

        Raises:
            LayoutError: when the modules differ in inputs, bits, group size or the kind of their factors, or factors
                do not fit their weight.
        """
        kinds = {(one.in_features, one.bits, one.group_size) for one in weights}
        if len(kinds) != 1:
            raise LayoutError(f"modules that are to share a launch differ in (inputs, bits, group size): {kinds}.")
        for weight, pair in zip(weights, factors, strict=True):
            if pair is not None:
                pair.check(weight)
        adapted = [pair for pair in factors if pair is not None]
        factor_kinds = {_kind(factor) for pair in adapted for factor in (pair.down, pair.up)}
        if len(factor_kinds) > 1:
            raise LayoutError(f"modules that are to share a launch differ in their factors: {factor_kinds}.")
        first = weights[0]
        indexed = not settings.tile_inputs(first.bits, first.row_group_size, first.in_features)
        counts = {len(pair.members) for pair in adapted}
        if len(counts) > 1:
            raise LayoutError(f"modules that are to share a launch have adapters of {counts} members.")
        members = counts.pop() if counts else 0
        downs = [_tensors(pair.down) for pair in adapted]
        ups = [(None, None) if pair is None else _tensors(pair.up) for pair in factors]
        stacked = cls(
            qweights=[one.qweight.contiguous() for one in weights],
            qzeros=[_zeros(one) for one in weights],
            scales=[one.scales.contiguous() for one in weights],
            g_idx=[one.group_of_input().to(torch.int32) if indexed or not one.ordered else None for one in weights],
            biases=list(biases),
            down=torch.cat([codes for codes, _ in downs]) if downs else None,
            down_scales=torch.cat([scales for _, scales in downs if scales is not None])
            if downs and downs[0][1] is not None
            else None,
            ups=[codes for codes, _ in ups],
            up_scales=[scales for _, scales in ups],
            bits=first.bits,
            group_size=first.row_group_size,
            factor_bits=adapted[0].down.bits if adapted and isinstance(adapted[0].down, QuantizedFactor) else 16,
            in_features=first.in_features,
            members=members,
            member_of=member_of(*(pair.members for pair in adapted)).to(first.qweight.device) if members else None,
            key=next(_keys),
        )
        stacked = replace(stacked, compiled=compiled(stacked))
        _prepared[stacked.key] = stacked
        return stacked

    def __call__(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> list[torch.Tensor]:
        """y = x Ŵᵀ + ((x Aᵀ) ∘ g) Bᵀ + bias of every module.

        Args:
            x: … × in; float16, bfloat16 or float32.
            weights: rows × members, float32, on x's device; None weighs all components by 1.

        Returns:
            … × out of each module, in x's dtype.

        Raises:
            LayoutError: for weights of another shape.
            NotImplementedError: for weights while a compiler traces: they change from call to call.
        """
        if not self.members:
            weights = None
        if weights is not None:
            rows = x.numel() // self.in_features
            if tuple(weights.shape) != (rows, self.members):
                raise LayoutError(f"weights of members should be {[rows, self.members]}, found {list(weights.shape)}.")
            if traced(x):
                raise NotImplementedError(UNCOMPILED)
        # The operator is for those who trace: to call it takes as long as a launch.
        return _linears(x, self, weights) if not traced(x) else _operator(x, self)

    def dense(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Ŵᵀ of one module after another, in × out, rounded once to ``dtype``."""
        for tensors in zip(self.qweights, self.qzeros, self.scales, self.g_idx, strict=True):
            yield dequantized(*tensors, in_features=self.in_features, bits=self.bits, group_size=self.group_size,
                              dtype=dtype)  # fmt: skip


@torch.library.custom_op("gptqmodel_eora_ext::fused_linears", mutates_args=())
def fused_linears(
    x: torch.Tensor,
    qweights: Sequence[torch.Tensor],
    qzeros: Sequence[torch.Tensor | None],
    scales: Sequence[torch.Tensor],
    g_idx: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None],
    down: torch.Tensor | None,
    down_scales: torch.Tensor | None,
    ups: Sequence[torch.Tensor | None],
    up_scales: Sequence[torch.Tensor | None],
    bits: int,
    group_size: int,
    factor_bits: int,
    key: int,
) -> list[torch.Tensor]:
    """y of every module, from x (rows × in, contiguous). The other arguments are the fields of `StackedLinears`."""
    known = _prepared.get(key)
    if known is not None and [one.data_ptr() for one in known.qweights] == [one.data_ptr() for one in qweights]:
        return _linears(x, known)
    # Tensors that were moved or copied since.
    return _linears(x, StackedLinears(
        list(qweights), list(qzeros), list(scales), list(g_idx), list(biases), down, down_scales, list(ups),
        list(up_scales), bits, group_size, factor_bits, x.shape[1],
    ))  # fmt: skip


@fused_linears.register_fake
def _(x: torch.Tensor, qweights: Sequence[torch.Tensor], *_: Any) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], qweight.shape[1]) for qweight in qweights]


def _operator(x: torch.Tensor, fused: StackedLinears) -> list[torch.Tensor]:
    rows = x.reshape(-1, fused.in_features).contiguous()
    told = (getattr(fused, one.name) for one in fields(fused) if one.name not in UNTRACED)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in fused_linears(rows, *told)]


def _linears(x: torch.Tensor, fused: StackedLinears, weights: torch.Tensor | None = None) -> list[torch.Tensor]:
    """y of every module in x's shape, by whichever kernel takes so many rows."""
    if fused.compiled is not None and fused.compiled.few is not None:
        ys = fused.compiled.few(x, weights)
        if ys is not None:
            return ys
    with on(x.device):
        ys = _launched_linears(x.reshape(-1, fused.in_features).contiguous(), fused, weights)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]


def _launched_linears(x: torch.Tensor, fused: StackedLinears, weights: torch.Tensor | None) -> list[torch.Tensor]:
    rows, in_features = x.shape
    outs = tuple(qweight.shape[1] for qweight in fused.qweights)
    bits = fused.bits
    indexed = any(one is not None for one in fused.g_idx)
    block_k = 0 if indexed else settings.tile_inputs(bits, fused.group_size, in_features)
    if rows in settings.COMPILED_ROWS and fused.compiled is not None and fused.compiled.many is not None:
        compiled_ys = fused.compiled.many(x, _components(x, fused, weights))
        if compiled_ys is not None:
            return compiled_ys
    if rows > settings.MOST_FUSED_ROWS:
        return _dense_linears(x, fused, weights)
    ys = [x.new_empty(rows, out) for out in outs]
    if rows == 0:
        return ys
    count = processors(x.device)
    ranks = [0 if up is None else up.shape[0] for up in fused.ups]
    if rows == 1:
        chosen = settings.gemv(outs, in_features, bits, indexed, count)
    else:
        chosen = settings.gemm(rows, outs, in_features, block_k, x.dtype, count)
    m_tiles = -(-rows // chosen.block_m)
    tiles = sum(-(-out // chosen.block_n) for out in outs)
    partials, locks = _meeting_place(x, fused, chosen, sum(outs), m_tiles * tiles)
    parts, part_count = (partials, 1) if fused.down is None else _shrink(x, fused, fused.down, locks, count, weights)
    arguments = (
        x, parts, tuple(ys), tuple(fused.qweights), tuple(fused.qzeros), tuple(fused.scales), tuple(fused.g_idx),
        tuple(fused.biases), tuple(fused.ups), tuple(fused.up_scales), outs, tuple(ranks), partials, locks,
    )  # fmt: skip
    sizes = (in_features, sum(outs), sum(ranks), part_count)
    weighed = weights is not None
    constants = {**_constants(fused, chosen, rows, in_features, part_count), "WEIGHED": weighed}
    key = _key(x, chosen, part_count, weighed)
    if rows == 1:
        windows = settings.unit_codes(bits) // settings.window_codes(bits)
        launch(
            fused.launches, key, gemv_kernel, (tiles, chosen.splits, 1),
            (*arguments, *sizes, windows, ONE, chosen.per_split), constants, chosen.options(),
        )  # fmt: skip
    else:
        launch(
            fused.launches, key, gemm_kernel, (m_tiles, tiles, chosen.splits),
            (*arguments, rows, *sizes, chosen.per_split), constants, chosen.options(),
        )  # fmt: skip
    return ys


def _meeting_place(
    x: torch.Tensor, fused: StackedLinears, chosen: settings.Settings, columns: int, tiles: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the programs that share the inputs of a tile leave their sums, and a lock for each tile.

    Where inputs are not split, one float and one lock stand for none, since kernels take pointers.
    """
    split = chosen.splits > 1
    partials = x.new_empty(chosen.splits * x.shape[0] * columns if split else 1, dtype=torch.float32)
    # The shrink kernel zeroes the locks; without it a memset does.
    make = x.new_zeros if split and fused.down is None else x.new_empty
    return partials, make(tiles if split else 1, dtype=torch.int32)


def _constants(
    fused: StackedLinears, chosen: settings.Settings, rows: int, in_features: int, part_count: int
) -> dict[str, Any]:
    """What is compiled into `gemv_kernel` (one row) or `gemm_kernel`, in their order."""
    codes = settings.unit_codes(fused.bits)
    first: dict[str, Any] = {"MODULES": len(fused.qweights), "BITS": fused.bits, "CODES": codes}
    adapter: dict[str, Any] = {
        "FACTOR_BITS": fused.factor_bits, "FACTOR_GROUP": GROUP_SIZE, "PARTS": part_count, "SPLITS": chosen.splits,
    }  # fmt: skip
    if rows == 1:
        # Whole rows may end within a unit; other groups are cut at units (`settings.tile_inputs`).
        groups = {"GROUP_UNITS": -(-fused.group_size // codes), "EVEN": in_features % codes == 0}
        tiles = {"BLOCK_N": chosen.block_n, "BLOCK_U": chosen.block_k, "BLOCK_R": chosen.block_r}
    else:
        groups = {"GROUP_SIZE": fused.group_size}
        tiles = {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k,
                 "BLOCK_R": chosen.block_r}  # fmt: skip
    return {**first, **groups, **adapter, **tiles}


def _dense_linears(x: torch.Tensor, fused: StackedLinears, weights: torch.Tensor | None) -> list[torch.Tensor]:
    """`_linears` by the vendor's matrix products, on Ŵ in x's dtype, one module's at a time."""
    t, first = _components(x, fused, weights), 0
    ys = []
    for weight, bias, up, up_scales in zip(fused.dense(x.dtype), fused.biases, fused.ups, fused.up_scales, strict=True):
        out = weight.shape[1]
        y = x @ weight if bias is None else torch.addmm(bias.to(x.dtype), x, weight)
        if t is not None and up is not None:
            rank = up.shape[0]
            y.addmm_(t[:, first : first + rank], _dense_factor(up, up_scales, out, fused.factor_bits, x.dtype))
            first += rank
        ys.append(y)
    return ys


def _components(x: torch.Tensor, fused: StackedLinears, weights: torch.Tensor | None) -> torch.Tensor | None:
    """(x Aᵀ) ∘ g of all modules in x's dtype, by the vendor's product; None without any adapter."""
    if fused.down is None:
        return None
    t = x @ _dense_factor(fused.down, fused.down_scales, x.shape[1], fused.factor_bits, x.dtype).T
    if weights is None:
        return t
    assert fused.member_of is not None
    return (t * weights[:, fused.member_of]).to(x.dtype)


def _dense_factor(
    codes: torch.Tensor, scales: torch.Tensor | None, features: int, factor_bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """A factor's values (rank × features) in ``dtype``."""
    if scales is None:
        return codes.to(dtype)
    dense = torch.empty(codes.shape[0], features, dtype=dtype, device=codes.device)
    factor_kernel[(-(-features // settings.FACTOR_COLUMNS), codes.shape[0])](
        dense, codes, scales, features, FACTOR_BITS=factor_bits, FACTOR_GROUP=GROUP_SIZE, BLOCK=settings.FACTOR_COLUMNS
    )
    return dense


def _shrink(
    x: torch.Tensor,
    fused: StackedLinears,
    down: torch.Tensor,
    locks: torch.Tensor,
    count: int,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, int]:
    """The first launch: parts of x Aᵀ (splits × rows × rank, float32), and their number; ``locks`` become zero."""
    rows, in_features = x.shape
    rank = down.shape[0]
    chosen = settings.shrink(rows, rank, in_features, x.dtype, count)
    parts = x.new_empty(chosen.splits * rows * rank, dtype=torch.float32)
    constants = {
        "FACTOR_BITS": fused.factor_bits, "FACTOR_GROUP": GROUP_SIZE, "BLOCK_M": chosen.block_m,
        "BLOCK_R": chosen.block_r, "BLOCK_K": chosen.block_k, "LOCKS": LOCKS,
        "MEMBERS": 0 if weights is None else fused.members,
    }  # fmt: skip
    launch(
        fused.launches, _key(x, chosen, weighed=weights is not None), shrink_kernel,
        (-(-rank // chosen.block_r), -(-rows // chosen.block_m), chosen.splits),
        (x, down, fused.down_scales, weights, None if weights is None else fused.member_of, parts, locks, rows,
         rank, in_features, chosen.per_split, locks.numel()),
        constants, chosen.options(),
    )  # fmt: skip
    return parts, chosen.splits


def _key(
    x: torch.Tensor, chosen: settings.Settings, part_count: int = 0, weighed: bool = False
) -> tuple[Any, ...] | None:
    """What tells apart the launches of one `StackedLinears`, whose tensors are always the same."""
    return (x.dtype, x.shape[0], chosen, part_count, weighed) if aligned(x) else None


def _zeros(weight: PackedWeight) -> torch.Tensor | None:
    """`qzeros` in version 2, or None where every zero is the middle code."""
    zeros = weight.zeros()
    if bool((zeros == 1 << (weight.bits - 1)).all()):
        return None
    if weight.stores_zero_minus_one:
        return pack_words(zeros.T, weight.bits).T.contiguous()
    return weight.qzeros.contiguous()


def _kind(factor: torch.Tensor | QuantizedFactor) -> str:
    return f"{factor.bits} bits" if isinstance(factor, QuantizedFactor) else str(factor.dtype)


def _tensors(factor: torch.Tensor | QuantizedFactor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the kernels read of a factor: values, or codes (int8 at 8 bits) and scales."""
    if not isinstance(factor, QuantizedFactor):
        return factor.contiguous(), None
    codes = factor.codes.view(torch.int8) if factor.bits == 8 else factor.codes
    return codes.contiguous(), factor.scales.contiguous()
