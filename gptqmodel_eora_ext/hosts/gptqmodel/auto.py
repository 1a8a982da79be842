"""`EoRA(rank="auto", budget=…)`: what has to be known of a model before its layer loop starts."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from gptqmodel.quantization.config import METHOD, RTNConfig

from ...budget import ModuleShape, budget_bytes, factor_bytes, uniform_rank
from ...files import cache_folder
from ...memory import roomy_device
from ...ranks import RankAllocation
from ...refine.forecast import Rounder, forecast_allocation
from ...refine.kinds import Divergence
from ...refine.sensitivity import Sensitivity, fingerprint, measure_sensitivity
from ...solve import Grid
from .adapter import EoRA

log = logging.getLogger(__name__)

# Tokens of the calibration data that sensitivities stand on: some 25 s for SmolLM2 on two cores. More: not tried.
SENSITIVITY_TOKENS = 4096
# Those of them that gradients are taken of, which cost twice as much: what errors fit themselves to is C.
GRADIENT_TOKENS = 2048
# Tokens that each kind of modules is measured on, others than those where there are more.
KIND_TOKENS = 512
# Tokens of a forward and backward pass; a longer window goes alone. The vocabulary's scores are what takes memory.
PASS_TOKENS = 1024

Quantized = Callable[[str, torch.Tensor], torch.Tensor]


def allocate_ranks(
    model: Any,
    adapter: EoRA,
    batches: Sequence[Mapping[str, Any]],
    fixed_rank: Callable[[str], int | None],
    quantized: Quantized | None = None,
) -> RankAllocation:
    """Measure sensitivities (or read them from the cache), forecast every module, and give out the budget.

    Args:
        model: GPTQModel's model object, full precision, before its loop.
        adapter: with rank "auto".
        batches: prepared calibration batches.
        fixed_rank: rank that `dynamic` names for a module, None where it names none.
        quantized: Ŵ of a module from its name and W, for a finished checkpoint; by default from a quick GPTQ.

    Raises:
        ValueError: for a budget in no known form, or a model without modules to compensate.
    """
    shapes = module_shapes(model)
    budget = budget_bytes(adapter.budget, shapes)
    dense, linears = full_precision(model, shapes)
    sensitivity = cached_sensitivity(dense, linears, batches, kind=adapter.sensitivity)
    log.info("EoRA: a budget of %.1f MB for %d modules.", budget / 1e6, len(shapes))
    config = model.quantize_config
    rounders: dict[Grid, Rounder] = {}

    def quickly(name: str, weight: torch.Tensor) -> torch.Tensor:
        grid = module_grid(config, name)
        rounder = rounders.setdefault(grid, Rounder(sensitivity, grid, spread=spreads_errors(config)))
        [approximation] = rounder(name, weight, [config.dynamic_get(name, "bits", config.bits)])
        return approximation

    return forecast_allocation(
        shapes,
        budget,
        adapter.factor_bits,
        sensitivity,
        {name: linear.weight.data for name, linear in linears.items()},
        quantized or quickly,
        Divergence(dense, linears, unseen_tokens(batches)),
        fixed_rank=fixed_rank,
        progress=functools.partial(_bar, title="EoRA: forecasting modules"),
    )


def budgeted_rank(shapes: Sequence[ModuleShape], adapter: EoRA) -> int:
    """The largest rank for all modules that the adapter's budget allows.

    Raises:
        ValueError: for a budget in no known form, or too small for rank 1.
    """
    budget = budget_bytes(adapter.budget, shapes)
    rank = uniform_rank(budget, shapes, adapter.factor_bits)
    if rank == 0:
        one = sum(factor_bytes(1, shape, adapter.factor_bits) for shape in shapes)
        raise ValueError(
            f"EoRA: the budget {adapter.budget!r} is {budget} bytes; rank 1 for all {len(shapes)} modules takes {one}. "
            f'Allow more, or let ranks differ: sensitivity="fisher".'
        )
    log.info("EoRA: a budget of %.1f MB for %d modules, rank %d for all.", budget / 1e6, len(shapes), rank)
    return rank


def module_grid(config: Any, name: str) -> Grid:
    """How GPTQModel will round a module's weights, by its `QuantizeConfig`."""
    # AWQ searches where to clip, by the squared error.
    mse = 2.0 if config.method == METHOD.AWQ else config.dynamic_get(name, "mse", getattr(config, "mse", None))
    return Grid(
        config.dynamic_get(name, "group_size", config.group_size),
        bool(config.dynamic_get(name, "sym", config.sym)),
        float(mse or 0.0),
    )


def spreads_errors(config: Any) -> bool:
    """Whether the quantiser spreads rounding errors over later columns: GPTQ and QQQ do, AWQ and nearest not."""
    return config.method in (METHOD.GPTQ, METHOD.QQQ) and not isinstance(config, RTNConfig)


def survey(
    model: Any, shapes: Sequence[ModuleShape], batches: Sequence[Mapping[str, Any]], *, kind: str
) -> tuple[dict[str, torch.nn.Linear], Sensitivity]:
    """What the loop will quantise at full precision, and its sensitivities.

    Args:
        model: GPTQModel's model object, full precision, before its loop.
        shapes: its `module_shapes`.
        batches: prepared calibration batches.
        kind: of sensitivity.

    Raises:
        NotImplementedError: for a module that is no linear layer in transformers' own model.
    """
    dense, linears = full_precision(model, shapes)
    return linears, cached_sensitivity(dense, linears, batches, kind=kind)


def full_precision(model: Any, shapes: Sequence[ModuleShape]) -> tuple[torch.nn.Module, dict[str, torch.nn.Linear]]:
    """The whole model in memory, and its linear layers; GPTQModel keeps its own on disk and brings in layer by layer.

    Raises:
        NotImplementedError: for a module that is no linear layer in transformers' own model.
    """
    from transformers import AutoModelForCausalLM

    dense: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        model.model_local_path, dtype="auto", trust_remote_code=bool(model.trust_remote_code)
    )
    device = roomy_device(dense, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    known = dict(dense.to(device).named_modules())
    strange = [shape.name for shape in shapes if not isinstance(known.get(shape.name), torch.nn.Linear)]
    if strange:
        raise NotImplementedError(
            f"EoRA: {strange[0]} is no linear layer of its own in transformers' model (experts may share a tensor), so "
            f"its sensitivity cannot be measured. Name a rank in place of the budget."
        )
    linears: dict[str, Any] = {shape.name: known[shape.name] for shape in shapes}
    return dense, linears


def cached_sensitivity(
    model: torch.nn.Module,
    linears: Mapping[str, torch.nn.Linear],
    batches: Sequence[Mapping[str, Any]],
    *,
    kind: str,
) -> Sensitivity:
    """Sensitivities from the cache of the user, or measured and put there."""
    some = first_tokens(batches, SENSITIVITY_TOKENS)
    named = fingerprint(model, linears, some, kind, gradient_tokens=GRADIENT_TOKENS)
    path = cache_folder() / "sensitivity" / f"{named}.safetensors"
    if path.is_file():
        log.info("EoRA: sensitivities from `%s`.", path)
        return Sensitivity.load(path)
    progress = functools.partial(_bar, title="EoRA: measuring sensitivities")
    found = measure_sensitivity(model, linears, some, kind=kind, gradient_tokens=GRADIENT_TOKENS, progress=progress)
    found.save(path)
    return found


def _bar(items: Iterable[Any], title: str) -> Iterable[Any]:
    """GPTQModel's own progress bar, with an estimate."""
    from gptqmodel.utils.logger import setup_logger

    bar: Iterable[Any] = setup_logger().pb(list(items)).title(title)
    return bar


def unseen_tokens(batches: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """`KIND_TOKENS` that sensitivities do not stand on; of little data the last, of a long window the first of it."""
    taken = first_tokens(batches, SENSITIVITY_TOKENS + KIND_TOKENS)
    found: list[Mapping[str, Any]] = []
    left = KIND_TOKENS
    for batch in reversed(taken):
        if left <= 0:
            break
        rows, width = batch["input_ids"].shape
        few = min(rows, -(-left // width))
        found.append({name: one[rows - few :, :KIND_TOKENS] for name, one in batch.items()})
        left -= few * width
    return found[::-1]


def first_tokens(batches: Sequence[Mapping[str, Any]], tokens: int) -> list[Mapping[str, Any]]:
    """As many windows as have so many tokens, in passes of `PASS_TOKENS`."""
    taken: list[Mapping[str, Any]] = []
    for batch in batches:
        ids = torch.atleast_2d(torch.as_tensor(batch["input_ids"]))
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask).reshape(ids.shape)
        rows = max(1, PASS_TOKENS // ids.shape[1])
        for few_ids, few_mask in zip(ids.split(rows), mask.split(rows), strict=True):
            if tokens <= 0:
                return taken
            taken.append({"input_ids": few_ids, "attention_mask": few_mask})
            tokens -= few_ids.numel()
    return taken


def module_shapes(model: Any) -> list[ModuleShape]:
    """Linear modules in the order in which the loop quantises them.

    Raises:
        ValueError: for a model without any.
    """
    shapes = linear_shapes(model)
    if not shapes:
        raise ValueError("EoRA: the model has no linear module to compensate.")
    return shapes


def linear_shapes(model: Any) -> list[ModuleShape]:
    """The same; empty for a model without any."""
    config = model.quantize_config
    known = dict(model.model.named_modules())
    names = [name for subset in model.simple_layer_modules(model.model.config, config) for name in subset]
    shapes = []
    for layers in model.extract_layers_node():
        for index in range(len(known[layers])):
            for name in names:
                full = f"{layers}.{index}.{name}"
                linear = known.get(full)
                if isinstance(linear, torch.nn.Linear) and config.dynamic_get(full) is not False:
                    shapes.append(ModuleShape(full, linear.out_features, linear.in_features))
    return shapes
