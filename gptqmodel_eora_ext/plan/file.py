"""`plan.json`: bits and rank of every module, as `eora plan` chose them and `eora quantize --plan` runs them."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..adapter.validate import validate_choice, validate_rank
from ..adapter.vocabulary import FACTOR_BITS
from ..formats.names import PLAN_MARK
from ..formats.sizes import WHOLE_ROW, ModuleShape
from ..system.files import write_json

FORMAT = "eora-plan-1"
BITS = (2, 3, 4, 8)
# Quantisers that plans are made for. Files that name none are of the first.
QUANTIZERS = ("gptq", "autoround")
# A message about modules that do not fit shows this many of their names.
SHOWN = 3


class PlanError(ValueError):
    """A plan's file cannot be used, or the plan is not for this model; the message says what to do."""


@dataclass(frozen=True)
class ModulePlan:
    """What one module gets: bits of its weights, and the rank of its adapter; 0 for none."""

    out_features: int
    in_features: int
    bits: int
    rank: int


@dataclass(frozen=True)
class Plan:
    """Bits and ranks for every module of a model, with the size and the loss that were predicted.

    Attributes:
        model: name or folder of the model that the plan was made for.
        sensitivity: kind of sensitivity by which losses were predicted.
        group_size: weights per scale; -1 for whole rows.
        sym: whether quantisation is symmetric.
        mse: GPTQModel's search for scales; 0 is off.
        factor_bits: bits of a stored factor: 16, 8 or 4.
        total_bytes: bytes of weights, scales, zeros and factors.
        adapter_bytes: bytes of the factors alone, scales included.
        predicted_loss: loss above that of the full-precision model, nats a token.
        modules: full module name → its bits and rank.
        quantizer: that losses were predicted for, "gptq" or "autoround".

    Example:
        >>> plan = Plan.read("plan.json")
        >>> model = GPTQModel.load("Qwen/Qwen3-8B", QuantizeConfig(**plan.quantize_config()))
        >>> model.quantize(calibration, adapter=EoRA(plan=plan))
    """

    model: str
    sensitivity: str
    group_size: int
    sym: bool
    mse: float
    factor_bits: int
    total_bytes: int
    adapter_bytes: int
    predicted_loss: float
    modules: Mapping[str, ModulePlan]
    quantizer: str = QUANTIZERS[0]

    @property
    def bits(self) -> int:
        """The width that most modules have."""
        return Counter(one.bits for one in self.modules.values()).most_common(1)[0][0]

    @property
    def largest_rank(self) -> int:
        """The largest rank of any module; 0 for a plan without adapters."""
        return max(one.rank for one in self.modules.values())

    def dynamic(self) -> dict[str, dict[str, Any]]:
        """Bits and ranks as GPTQModel's `dynamic` takes them: module by module, by exact name."""
        adapted = bool(self.largest_rank)
        return {
            f"+:^{re.escape(name)}$": {"bits": one.bits, **({"adapter": {"rank": one.rank}} if adapted else {})}
            for name, one in self.modules.items()
        }

    def quantize_config(self) -> dict[str, Any]:
        """What GPTQModel's `QuantizeConfig` takes: `QuantizeConfig(**plan.quantize_config())`."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "mse": self.mse,
            **without_groups(self.group_size),
            "dynamic": self.dynamic(),
            "meta": {PLAN_MARK: FORMAT},
        }

    def autoround_config(self) -> dict[str, Any]:
        """What AutoRound takes: `AutoRound(model, **plan.autoround_config(), alg_configs=["signround", …])`.

        The search for scales is GPTQModel's; AutoRound tunes them.
        """
        return {
            "scheme": f"W{self.bits}A16",
            "group_size": self.group_size,
            "sym": self.sym,
            "layer_config": {name: {"bits": one.bits} for name, one in self.modules.items()},
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write to a JSON file, with `dynamic` for those who quantise without this plugin.

        The file is replaced in one step: a reader finds the old one or the whole new one.
        """
        write_json(Path(path), {"format": FORMAT, **asdict(self), "dynamic": self.dynamic()})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `write` wrote.

        Raises:
            PlanError: for a file that is no plan, has another format, or holds values out of range.
        """
        where = f"`{os.fspath(path)}`"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"{where} is no plan: {error}. Make one with `eora plan … --total … --out`.") from error
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        if found != FORMAT:
            raise PlanError(f"{where} has the format {found!r}, expected {FORMAT!r}. Make it anew with `eora plan`.")
        del content["format"]
        dynamic = content.pop("dynamic", None)
        content.setdefault("quantizer", QUANTIZERS[0])
        _require_keys(content, cls, where)
        modules = content["modules"]
        if not isinstance(modules, dict) or not modules:
            raise PlanError(f"{where}: `modules` must name the modules, got {modules!r}.")
        for name, entry in modules.items():
            _check_module(entry, f"{where}: {name}")
        try:
            validate_choice(content["factor_bits"], FACTOR_BITS, what=f"{where}: `factor_bits`")
            validate_choice(content["quantizer"], QUANTIZERS, what=f"{where}: `quantizer`")
        except ValueError as error:
            raise PlanError(str(error)) from error
        plan = cls(**{**content, "modules": {name: ModulePlan(**entry) for name, entry in modules.items()}})
        if dynamic not in (None, plan.dynamic()):
            raise PlanError(f"{where}: `dynamic` does not say what `modules` says. Edit `modules`, drop `dynamic`.")
        return plan

    def check(self, shapes: Iterable[ModuleShape]) -> None:
        """Refuse a model whose modules differ from the plan's, by name or by shape.

        Args:
            shapes: the modules of the model that is to be quantised.

        Raises:
            PlanError: naming the module, what was found and what was expected.
        """
        known = {shape.name: shape for shape in shapes}
        for problem, names in (
            ("has no", sorted(set(self.modules) - set(known))),
            ("also has", sorted(set(known) - set(self.modules))),
        ):
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                raise PlanError(
                    f"the plan for `{self.model}` names {len(self.modules)} modules; the model {problem} "
                    f"{', '.join(names[:SHOWN])}{more}. Make a plan of this model with `eora plan`."
                )
        for name, one in self.modules.items():
            shape = known[name]
            if (shape.out_features, shape.in_features) != (one.out_features, one.in_features):
                raise PlanError(
                    f"{name}: the plan for `{self.model}` expects {one.out_features} × {one.in_features}, found "
                    f"{shape.out_features} × {shape.in_features}. Make a plan of this model with `eora plan`."
                )


def plan_to_follow(plan: Plan | str | os.PathLike[str], *, rank: Any, budget: Any) -> Plan:
    """The plan that an adapter is asked to follow.

    Args:
        plan: itself, or its file.
        rank, budget: what else was asked; None for nothing.

    Raises:
        ValueError: for a rank or a budget beside it, or a plan without any adapter.
        PlanError: for a file that is no plan.
    """
    if rank is not None or budget is not None:
        raise ValueError("EoRA: `plan` names the ranks; leave `rank` and `budget` out.")
    found = plan if isinstance(plan, Plan) else Plan.read(plan)
    if not found.largest_rank:
        raise ValueError("EoRA: the plan gives no module an adapter; quantise with its config and no adapter.")
    return found


def without_groups(group_size: int) -> dict[str, Any]:
    """What GPTQModel's `QuantizeConfig` has to be told where a scale serves a whole row.

    By default it orders columns by their groups (`act_group_aware`), and refuses to where there are none.
    """
    return {"act_group_aware": False} if group_size == WHOLE_ROW else {}


def _require_keys(content: Mapping[str, Any], cls: Any, where: str) -> None:
    expected = {one.name for one in fields(cls)}
    if set(content) != expected:
        missing, strange = sorted(expected - set(content)), sorted(set(content) - expected)
        raise PlanError(f"{where}: missing {missing}, unknown {strange}. Make the plan anew with `eora plan`.")


def _check_module(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise PlanError(f"{where} must be an object, got {entry!r}.")
    _require_keys(entry, ModulePlan, where)
    try:
        validate_choice(entry["bits"], BITS, what=f"{where}: `bits`")
        validate_rank(entry["rank"], what=f"{where}: `rank`", minimum=0)
        for side in ("out_features", "in_features"):
            validate_rank(entry[side], what=f"{where}: `{side}`")
    except ValueError as error:
        raise PlanError(str(error)) from error
