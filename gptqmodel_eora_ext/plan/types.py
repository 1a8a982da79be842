"""Types of a quantiser's own and ranks, chosen together under one size: for files whose types are no plain widths.

What each type costs a module is forecast on Ŵ as the quantiser itself has made it, so no type is imitated here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.errors import AdapterError, Fields, read_json
from ..formats.factors import FactorLayout
from ..formats.sizes import ModuleShape
from ..solve import Curve, allocate, rank_curve
from ..system.files import write_json
from .forecast import Forecast
from .modules import KEPT_BY_ROUNDING, choice_curve, undominated
from .ranks import RankOptions, rank_options

# The size is divided into so many steps, as for mixes of widths.
STEPS = 20_000
VERSION = 1
REMEDY = "Make the plan again by `eora plan --host`."


@dataclass(frozen=True)
class TypedModule:
    """A module and what it may become.

    Attributes:
        shape: name, out_features and in_features.
        tensor: its name in the quantiser's files. Modules of one tensor (experts) share a type and a rank.
        nbytes: type → bytes of its weights.
        forecasts: type → forecast.
    """

    shape: ModuleShape
    tensor: str
    nbytes: Mapping[str, int]
    forecasts: Mapping[str, Forecast]


@dataclass(frozen=True)
class TypeChoice:
    """What a module becomes.

    Attributes:
        tensor: its name in the quantiser's files.
        type: of its weights.
        rank: of its factors; 0 for none.
        nbytes: of weights and factors.
        loss: predicted.
    """

    tensor: str
    type: str
    rank: int
    nbytes: int
    loss: float


@dataclass(frozen=True)
class TypePlan:
    """Types and ranks of all modules.

    Attributes:
        model: the full-precision model.
        host: whose types these are.
        factor_bits: of the factors.
        modules: full module name → what it becomes.
    """

    model: str
    host: str
    factor_bits: int
    modules: Mapping[str, TypeChoice]

    @property
    def nbytes(self) -> int:
        """Of weights and factors together."""
        return sum(one.nbytes for one in self.modules.values())

    @property
    def loss(self) -> float:
        """Predicted, summed over modules."""
        return sum(one.loss for one in self.modules.values())

    @property
    def ranks(self) -> dict[str, int]:
        """Full module name → rank, 0 for none."""
        return {name: one.rank for name, one in self.modules.items()}

    def write(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, {
            "version": VERSION, "model": self.model, "host": self.host, "factor_bits": self.factor_bits,
            "total_bytes": self.nbytes, "predicted_loss": self.loss,
            "modules": {name: vars(one) for name, one in self.modules.items()},
        })  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> TypePlan:
        """Read a plan.

        Raises:
            AdapterError: for a file of another form; it names the field.
        """
        content = read_json(path)
        fields = Fields(content, f"`{path}`", REMEDY)
        host, modules = fields.text("host"), content.get("modules")
        if not host or not isinstance(modules, dict) or content.get("version") != VERSION:
            raise AdapterError(f"`{path}` is no plan of types and ranks (version {VERSION}). {REMEDY}")
        return cls(
            model=fields.text("model") or "",
            host=host,
            factor_bits=fields.whole("factor_bits", least=1),
            modules={name: _read_choice(one, f"`{path}`: {name}") for name, one in modules.items()},
        )


def _read_choice(content: Any, where: str) -> TypeChoice:
    if not isinstance(content, dict):
        raise AdapterError(f"{where} should be an object, found {content!r}. {REMEDY}")
    fields = Fields(content, where, REMEDY)
    return TypeChoice(
        tensor=fields.text("tensor") or "",
        type=fields.text("type") or "",
        rank=fields.whole("rank", least=0),
        nbytes=fields.whole("nbytes", least=0),
        loss=fields.number("loss", 0.0),
    )


def choose(
    modules: Sequence[TypedModule],
    total: int,
    *,
    model: str,
    host: str,
    factor_bits: int,
    layout: FactorLayout,
    plain: Mapping[str, Mapping[str, str]],
) -> TypePlan:
    """The types and ranks of least predicted loss within ``total`` bytes, never worse than a plain file of that size.

    Args:
        modules: with forecasts of every type on offer.
        total: bytes of weights and factors.
        model: the full-precision model, for the record.
        host: whose types these are, for the record.
        factor_bits: of the factors.
        layout: of the factors.
        plain: a file's name → full module name → type, of whole files to compare with.

    Raises:
        ValueError: when even the smallest types do not fit.
    """
    tensors: dict[str, list[TypedModule]] = {}
    for module in modules:
        tensors.setdefault(module.tensor, []).append(module)
    options = [_options(members, factor_bits, layout) for members in tensors.values()]
    least = sum(choices[0].nbytes for choices in options)
    if total < least:
        weights = sum(module.shape.weights for module in modules)
        raise ValueError(
            f"EoRA: a total of {total} bytes ({8 * total / weights:.3f} bpw) is below what the smallest types on offer "
            f"take: {least} bytes ({8 * least / weights:.3f} bpw). Allow more, or offer a file of a smaller type."
        )
    picked = allocate([choice_curve(few) for few in options], total, steps=STEPS)
    taken = [few[index] for few, index in zip(options, picked, strict=True)]
    chosen = {name: one for choice in taken for name, one in choice.of_modules.items()}
    found = _plan(modules, [chosen[one.shape.name] for one in modules], model, host, factor_bits)
    for types in plain.values():
        # Bytes are rounded up to steps, so that a file which fits exactly may have been passed over.
        whole = _plan(modules, [_plainly(one, types[one.shape.name]) for one in modules], model, host, factor_bits)
        if whole.nbytes <= total and whole.loss < found.loss:
            found = whole
    return found


def _plan(
    modules: Sequence[TypedModule], taken: Sequence[TypeChoice], model: str, host: str, factor_bits: int
) -> TypePlan:
    return TypePlan(
        model, host, factor_bits, {one.shape.name: choice for one, choice in zip(modules, taken, strict=True)}
    )


def _plainly(module: TypedModule, kind: str) -> TypeChoice:
    return TypeChoice(module.tensor, kind, 0, module.nbytes[kind], module.forecasts[kind].total)


@dataclass(frozen=True)
class _TensorChoice:
    """What the modules of one tensor become together.

    Attributes:
        of_modules: full module name → what it becomes.
        nbytes: of all of them.
        loss: of all of them.
    """

    of_modules: Mapping[str, TypeChoice]
    nbytes: int
    loss: float


def _options(members: Sequence[TypedModule], factor_bits: int, layout: FactorLayout) -> list[_TensorChoice]:
    """What the modules of a tensor may take, ascending in bytes, without what is larger and no better."""
    found: list[_TensorChoice] = []
    for kind in members[0].forecasts:
        most = max(len(one.forecasts[kind].gains) for one in members)
        ranks = rank_options(members[0].shape, most, factor_bits, layout=layout)
        curves = [_curve(one.forecasts[kind], ranks, factor_bits) for one in members]
        for index, rank in enumerate(ranks.ranks):
            of_modules = {
                one.shape.name: TypeChoice(
                    one.tensor, kind, rank, one.nbytes[kind] + curve.nbytes[index], curve.losses[index]
                )
                for one, curve in zip(members, curves, strict=True)
            }
            nbytes, loss = (sum(getattr(one, what) for one in of_modules.values()) for what in ("nbytes", "loss"))
            found.append(_TensorChoice(of_modules, nbytes, loss))
    return undominated(found)


def _curve(known: Forecast, ranks: RankOptions, factor_bits: int) -> Curve:
    """Of a module; ranks beyond the components that its tokens allow take their bytes all the same."""
    within = [min(rank, len(known.gains)) for rank in ranks.ranks]
    return rank_curve(KEPT_BY_ROUNDING[factor_bits] * known.gains, known.total, within, ranks.nbytes)
