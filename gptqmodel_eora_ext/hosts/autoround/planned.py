"""A plan is checked against AutoRound's model before its loop starts."""

from __future__ import annotations

from typing import Any

from ...adapter.layers import shape_of
from ...plan import Plan, PlanError
from .modules import quantized_linears


def check_plan(orchestrator: Any, plan: Plan) -> None:
    """Refuse a model that is not the plan's, or to which AutoRound was not given the plan's widths.

    Args:
        orchestrator: AutoRound's object for a run whose scheme is resolved.
        plan: what is to be run.

    Raises:
        PlanError: naming the module, what was found and what was expected.
    """
    linears = quantized_linears(orchestrator)
    plan.check([shape_of(name, one) for name, one in linears.items()])
    for name, one in plan.modules.items():
        linear = linears[name]
        found = (linear.bits, linear.group_size, bool(linear.sym))
        expected = (one.bits, plan.group_size, plan.sym)
        if found != expected:
            raise PlanError(
                f"{name}: AutoRound would quantise it by (bits, group_size, sym) = {found}, the plan says {expected}. "
                f"Pass the plan's widths: AutoRound(model, **plan.autoround_config(), …)."
            )
