"""`eora generate BASE model-Q2_K.gguf`: an adapter in GGUF for a quantised GGUF model."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...adapter.factors import ModuleFactors
from ...adapter.options import AdapterOptions
from ...adapter.vocabulary import FACTOR_BITS
from ...formats.factors import QuantizedFactor, pack
from ...formats.gguf import gguf_package
from ...formats.gguf.blocks import GGUF_LAYOUT
from ...formats.gguf.lora import LoraPair, write_lora
from ...formats.gguf.model import GGUFModel
from ...formats.sizes import ModuleShape
from ...loop.weights import file_fingerprint
from ...system.distributed import by_first
from ..jobs import AdapterJob, KnownWeights, LoopJob, ReadWeight
from ..registry import layer_loop
from .weights import GGUFWeights, Placed

log = logging.getLogger(__name__)

# What the adapter is called where no name is given: model-Q2_K.gguf → model-Q2_K.eora.gguf.
DEFAULT_SUFFIX = ".eora.gguf"
# Of a split model the first part's name, without the number of the part.
PART = re.compile(r"-\d{5}-of-\d{5}$")


def generate_adapter(job: AdapterJob) -> Path:
    """Make an adapter for a GGUF file and return the adapter's file.

    Args:
        job: its checkpoint is the quantised model's file. Factors of 16 bits are stored in F16, of 8 in Q8_0, of 4 in
            Q4_0; the last two take ranks in multiples of 32.

    Raises:
        ValueError: for a file that is broken or was made from another model, a rank that cannot be stored, missing
            data, or the package `gguf` missing.
        NotImplementedError: for an architecture that the layer loop does not know.
        ModuleError: when compensating a module fails.
    """
    job.require_whole("a file of llama.cpp")
    gguf_package()
    _check_rank(job.adapter)
    output = job.output if job.output is not None else _beside(job.checkpoint)
    if output.is_dir():
        raise ValueError(f"EoRA: `{output}` is a folder; an adapter for llama.cpp is a file. Name it, as `eora.gguf`.")
    model = GGUFModel(job.checkpoint)
    weights = GGUFWeights(model, job.base)

    def known(shapes: Sequence[ModuleShape], read: ReadWeight) -> KnownWeights:
        found = weights.known(shapes, read)
        unplanned = next((name for name in found if job.ranks is not None and name not in job.ranks), None)
        if unplanned is not None:
            raise ValueError(f"EoRA: the plan names no rank for {unplanned} of `{job.base}`; it is of another model.")
        return found

    made = layer_loop(job.base)(
        LoopJob(
            base=job.base,
            known=known,
            windows=job.windows,
            adapter=job.adapter,
            layout=GGUF_LAYOUT,
            ranks=job.ranks,
            together=weights.sharing,
            method="gguf " + ", ".join(sorted({info.type for info in model.linear()})),
            batch_size=job.batch_size,
            loading=job.loading,
            report=job.report,
            keeping=job.keeping,
            source=file_fingerprint(job.checkpoint),
        )
    )
    details = {**made.details, "modules": {name: one.report() for name, one in made.factors.items()}}
    by_first(
        lambda: write_lora(
            output,
            model.architecture,
            lora_pairs(made.factors, weights.placed),
            name=f"EoRA for {job.checkpoint.name}",
            details=details,
        )
    )
    if job.keeping is not None:
        job.keeping.finish()
    log.info("EoRA: %d adapters written to `%s`.", len(made.factors), output)
    return output


def _check_rank(adapter: Mapping[str, Any]) -> None:
    """Refuse a rank that the factors' type cannot store, before a model is loaded."""
    options = AdapterOptions.settle(**adapter).for_making(**adapter)
    multiple = GGUF_LAYOUT.multiple
    if options.factor_bits < FACTOR_BITS[0] and isinstance(options.rank, int) and options.rank % multiple:
        lower = max(options.rank // multiple, 1) * multiple
        raise ValueError(
            f"EoRA: llama.cpp stores factors of {options.factor_bits} bits in blocks of {multiple} components, so the "
            f"rank has to be a multiple of {multiple}, got {options.rank}. Take {lower} or {lower + multiple}, or "
            f"factors of 16 bits."
        )


def _beside(checkpoint: Path) -> Path:
    return checkpoint.with_name(PART.sub("", checkpoint.stem) + DEFAULT_SUFFIX)


def lora_pairs(factors: Mapping[str, ModuleFactors], placed: Mapping[str, Placed]) -> dict[str, LoraPair]:
    """Factors by the names of the file's tensors, B's rows in the file's order. Modules of rank 0 are left out.

    Args:
        factors: full module name → factors.
        placed: full module name → its place in the file.
    """
    found: dict[str, LoraPair] = {}
    experts: dict[str, dict[int, ModuleFactors]] = {}
    for name, one in factors.items():
        at = placed[name]
        if at.place.expert is not None:
            experts.setdefault(at.place.tensor, {})[at.place.expert] = one
        elif one.rank:
            lora_A, lora_B = one.packed or (one.lora_A, one.lora_B)
            found[at.place.tensor] = LoraPair(lora_A, reordered(lora_B, at.in_file_order))
    for tensor, members in experts.items():
        if any(one.rank for one in members.values()):
            found[tensor] = _of_experts([members[index] for index in range(len(members))])
    return found


def reordered(
    lora_B: torch.Tensor | QuantizedFactor, order: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor | QuantizedFactor:
    """B (out × rank) with its rows in another order (`Placed.in_file_order`, `Placed.in_model_order`)."""
    if not isinstance(lora_B, QuantizedFactor):
        return order(lora_B)
    return replace(lora_B, codes=order(lora_B.codes), scales=order(lora_B.scales))


def _of_experts(members: list[ModuleFactors]) -> LoraPair:
    """The factors of all experts of one tensor, which share a rank there: the lower ones are filled up with zeros."""
    rank = max(one.rank for one in members)
    bits = next((one.packed[0].bits for one in members if one.packed), None)
    if bits is None:
        lora_A = torch.stack([_padded(one.lora_A, (rank, one.in_features)) for one in members])
        lora_B = torch.stack([_padded(one.lora_B, (one.out_features, rank)) for one in members])
        return LoraPair(lora_A, lora_B)
    pairs = [one.packed or _nothing(one, bits) for one in members]
    return LoraPair(
        [_filled(pair[0], rank, pair[0].features) for pair in pairs],
        [_filled(pair[1], pair[1].codes.shape[0], rank) for pair in pairs],
    )


def _padded(values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    result = values.new_zeros(shape)
    result[: values.shape[0], : values.shape[1]] = values
    return result


def _nothing(one: ModuleFactors, bits: int) -> tuple[QuantizedFactor, QuantizedFactor]:
    """A component of zeros, for an expert that no token reached."""
    block = GGUF_LAYOUT.group_size

    def zeros(rows: int, features: int) -> QuantizedFactor:
        codes = pack(torch.zeros(rows, features, dtype=torch.int8), bits)
        return QuantizedFactor(codes, torch.zeros(rows, features // block, dtype=torch.float16), bits, features, block)

    return zeros(block, one.in_features), zeros(one.out_features, block)


def _filled(factor: QuantizedFactor, rows: int, features: int) -> QuantizedFactor:
    codes = _padded(factor.integers(), (rows, features))
    scales = _padded(factor.scales, (rows, features // factor.group_size))
    return QuantizedFactor(pack(codes, factor.bits), scales, factor.bits, features, factor.group_size)
