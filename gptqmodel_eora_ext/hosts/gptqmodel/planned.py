"""A plan, or the size that an adapter will have, is checked against GPTQModel's model before its loop starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from gptqmodel.quantization.config import METHOD

from ...adapter.budget import budget_bytes
from ...adapter.vocabulary import AUTO
from ...formats.sizes import ModuleShape, factor_bytes, weight_bytes
from ...plan import Plan, PlanError
from .adapter import EoRA
from .modules import linear_shapes, module_shapes

log = logging.getLogger(__name__)

# The next width that GPTQModel has kernels for.
NEXT_BITS = {2: 3, 3: 4, 4: 8}


def check_plan(model: Any, plan: Plan) -> None:
    """Refuse a model that is not the plan's, or that was loaded with another config.

    Args:
        model: GPTQModel's model object, full precision.
        plan: what is to be run.

    Raises:
        PlanError: naming what was found and what was expected.
    """
    config = model.quantize_config
    remedy = "Load the model with QuantizeConfig(**plan.quantize_config())."
    for key, expected in plan.quantize_config().items():
        found = getattr(config, key, None)
        if key == "mse":
            found = float(found or 0.0)
        # `dynamic` is compared module by module; the host adds to `meta`, which nothing computes with.
        if found != expected and key not in ("dynamic", "meta"):
            raise PlanError(f"QuantizeConfig: `{key}` is {found!r}, the plan says {expected!r}. {remedy}")
    plan.check(module_shapes(model))
    for name, one in plan.modules.items():
        bits = config.dynamic_get(name, "bits", config.bits)
        rank = config.dynamic_get(name, "adapter", sub_key="rank", default=0)
        if (bits, rank) != (one.bits, one.rank):
            raise PlanError(
                f"{name}: `dynamic` gives {bits} bits and rank {rank}, the plan {one.bits} bits and rank {one.rank}. "
                f"{remedy}"
            )


def warn_if_dominated(model: Any, adapter: EoRA) -> None:
    """Warn when the adapter makes the model larger than plain weights of the next width.

    Sizes are those of the GPTQ format. An adapter of a plan is passed over: the plan has compared these sizes itself.
    """
    config = model.quantize_config
    if adapter.plan is not None or config.method != METHOD.GPTQ or config.bits not in NEXT_BITS:
        return
    shapes = linear_shapes(model)
    with_adapter = stored_bytes(model, shapes) + adapter_bytes(model, shapes, adapter)
    wider = stored_bytes(model, shapes, {bits: NEXT_BITS.get(bits, bits) for bits in NEXT_BITS})
    if with_adapter > wider:
        weights = sum(shape.weights for shape in shapes)
        log.warning(
            "EoRA: %d bits with this adapter take %.1f MB (%.2f bits a weight), more than plain %d bits, "
            "%.1f MB (%.2f), which may well be better. `eora plan` predicts both, and mixes of bits and ranks "
            "at the same size.",
            config.bits, with_adapter / 1e6, 8 * with_adapter / weights,
            NEXT_BITS[config.bits], wider / 1e6, 8 * wider / weights,
        )  # fmt: skip


def stored_bytes(model: Any, shapes: Sequence[ModuleShape], widths: dict[int, int] | None = None) -> int:
    """Bytes of the weights, scales and zeros by the model's config, each width replaced by what ``widths`` says."""
    config = model.quantize_config
    total = 0
    for shape in shapes:
        bits = config.dynamic_get(shape.name, "bits", config.bits)
        group_size = config.dynamic_get(shape.name, "group_size", config.group_size)
        total += weight_bytes(shape, (widths or {}).get(bits, bits), group_size)
    return total


def adapter_bytes(model: Any, shapes: Sequence[ModuleShape], adapter: EoRA) -> int:
    """Bytes of the factors that an adapter will have, scales included."""
    if adapter.rank == AUTO:
        return budget_bytes(adapter.budget, shapes)
    config = model.quantize_config
    total = 0
    for shape in shapes:
        rank = config.dynamic_get(shape.name, "adapter", sub_key="rank", default=None)
        rank = adapter.rank if rank is None else rank
        total += factor_bytes(min(int(rank or 0), shape.in_features, shape.out_features), shape, adapter.factor_bits)
    return total
