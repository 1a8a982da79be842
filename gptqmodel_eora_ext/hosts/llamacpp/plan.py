"""`eora plan BASE --host llamacpp`: ggml's types and ranks of all modules under one size.

What a type costs a module is forecast on Ŵ from files that `llama-quantize` has made, one for each type on offer; a
file of mixed types (Q3_K_M, IQ2_XS) offers each module the type that it has there. `llama-quantize` rounds a tensor by
itself, so the planned file holds the very same weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ...adapter.budget import budget_bytes
from ...formats.gguf.blocks import GGUF_LAYOUT
from ...formats.gguf.model import GGUFModel, bits_per_weight
from ...formats.sizes import ModuleShape
from ...plan.ranks import most_rank
from ...plan.sweep import Question, Rounding
from ...plan.types import TypedModule, TypePlan, choose
from ...solve import Grid
from ..jobs import KnownWeights, TypePlanJob, TypePlanned
from ..registry import full_precision
from .weights import GGUFWeights

NAME = "llamacpp"
# The file for `llama-quantize --tensor-type-file`, beside plan.json.
TYPES_SUFFIX = ".types.txt"
# Nothing is rounded here; the quantiser has done it.
NO_GRID = Grid(-1, True)
# Ranks on offer end here, whatever the total: each component more is one more to forecast, in each type.
MOST_RANK = 256
Reader = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Offer:
    """The types that the files offer a module, in their order."""

    tensor: str
    types: tuple[str, ...]
    readers: tuple[Reader, ...]


def plan_types(job: TypePlanJob) -> TypePlanned:
    """Choose types and ranks.

    In memory at a time: what a forecast of one layer takes, and one Ŵ of a module (`plan.sweep`).

    Raises:
        ValueError: for files that are broken, of another model, or that do not hold the same quantised modules; for a
            total that is too small.
        NotImplementedError: for a model that cannot be run layer by layer.
    """
    files = [GGUFModel(path) for path in job.files]
    opened = full_precision(job.base)(job.base, job.trust_remote_code)
    shapes = opened.shapes
    read = opened.layered().weight
    found = []
    for file in files:
        weights = GGUFWeights(file, job.base)
        found.append((weights, weights.known(shapes, read)))
    _check_same(found, files)
    planned = [shape for shape in shapes if shape.name in found[0][1]]
    offers = {shape.name: _offer(shape.name, found) for shape in planned}
    total = budget_bytes(job.total, planned)
    question = _question(planned, offers, total, job.factor_bits)
    swept = opened.survey(job.windows, question, job.sensitivity, job.bar)
    modules = [
        TypedModule(
            shape,
            offers[shape.name].tensor,
            {kind: _nbytes(shape, kind) for kind in offers[shape.name].types},
            {kind: swept.forecasts[shape.name][index] for index, kind in enumerate(offers[shape.name].types)},
        )
        for shape in planned
    ]
    plain = {str(weights.model.path): _types(weights) for weights, _ in found}
    plan = choose(
        modules, total, model=job.base, host=NAME, factor_bits=job.factor_bits, layout=GGUF_LAYOUT, plain=plain
    )
    losses = {
        Path(name).name: (
            sum(one.nbytes[types[one.shape.name]] for one in modules),
            sum(one.forecasts[types[one.shape.name]].total for one in modules),
        )
        for name, types in plain.items()
    }
    return TypePlanned(plan, sum(shape.weights for shape in planned), losses, partial(write, plan))


def _types(weights: GGUFWeights) -> dict[str, str]:
    """Full module name → type in the file."""
    return {name: weights.model.info(one.place.tensor).type for name, one in weights.placed.items()}


def _check_same(found: Sequence[tuple[GGUFWeights, KnownWeights]], files: Sequence[GGUFModel]) -> None:
    """Refuse files of which one keeps a module in 16 bits that another quantises."""
    first = set(found[0][1])
    for (_, known), file in zip(found, files, strict=True):
        other = sorted(first ^ set(known))
        if other:
            raise ValueError(
                f"EoRA: `{files[0].path}` and `{file.path}` do not quantise the same modules ({other[0]} for "
                f"instance). Make all files by llama-quantize from one F16 file, with the same --tensor-type options."
            )


def _offer(name: str, found: Sequence[tuple[GGUFWeights, KnownWeights]]) -> _Offer:
    readers: dict[str, Reader] = {}
    tensor = found[0][0].placed[name].place.tensor
    for weights, known in found:
        readers.setdefault(weights.model.info(tensor).type, known[name])
    return _Offer(tensor, tuple(readers), tuple(readers.values()))


def _question(shapes: Sequence[ModuleShape], offers: Mapping[str, _Offer], total: int, factor_bits: int) -> Question:
    least = sum(min(_nbytes(shape, kind) for kind in offers[shape.name].types) for shape in shapes)
    most = min(most_rank(shapes, max(total - least, 0), factor_bits, layout=GGUF_LAYOUT), MOST_RANK)
    sides = {shape.name: min(shape.in_features, shape.out_features) for shape in shapes}

    def candidates(name: str, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        for read in offers[name].readers:
            yield read(weight)

    return Question(
        lambda name: Rounding(tuple(range(len(offers[name].types))), NO_GRID),
        lambda name, index: min(most, sides[name]),
        candidates=candidates,
    )


def _nbytes(shape: ModuleShape, kind: str) -> int:
    return round(shape.weights * bits_per_weight(kind) / 8)


def write(plan: TypePlan, path: Path) -> list[str]:
    """Write the plan, and its types as `llama-quantize --tensor-type-file` takes them.

    Returns:
        How to go on, line by line.
    """
    types = path.with_suffix(TYPES_SUFFIX)
    # Each name is an expression that is looked for anywhere in a tensor's name. Experts share a tensor.
    lines = dict.fromkeys(f"^{re.escape(one.tensor)}$={one.type.lower()}" for one in plan.modules.values())
    types.write_text("\n".join([*lines, ""]), encoding="utf-8")
    plan.write(path)
    steps = [f"llama-quantize --imatrix IMATRIX --tensor-type-file {types} MODEL-F16.gguf PLANNED.gguf Q2_K"]
    if any(plan.ranks.values()):
        steps.append(f"eora generate {plan.model} PLANNED.gguf --plan {path} --out ADAPTER.gguf --calibration …")
    return steps
