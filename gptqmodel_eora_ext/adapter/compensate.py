"""One module's compensation: from its weights before and after quantisation to the factors that are stored."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..capture import CrossMoment, OutputErrorMoment, SecondMoment
from ..formats.factors import PACKED_LAYOUT, FactorLayout
from ..solve import (
    balance,
    balance_together,
    diagonal,
    energy_left,
    eora,
    eora_from_outputs,
    orthonormal,
    output_target,
    quantize_factors,
    refit_A,
    round_to,
    stored_B,
    svd,
    weighted_energy,
)
from .factors import ModuleFactors

log = logging.getLogger(__name__)

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """What is asked of a module's factors.

    Attributes:
        rank: components; 0 gives factors of no effect.
        objective: "eora", "output", "diagonal" or "svd".
        factor_bits: 16, 8 or 4.
        choose: picks the components to keep out of ``rank``, as indices, from A, B, C and ΔW.
        layout: of the file that they will lie in.
    """

    rank: int
    objective: str = "eora"
    factor_bits: int = 16
    choose: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    layout: FactorLayout = PACKED_LAYOUT

    @property
    def is_plain(self) -> bool:
        """Whether the second moment of the output error is all that it needs."""
        return self.objective == "eora" and self.factor_bits == 16 and self.choose is None


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype factors are stored in: the model's own where a quantised kernel runs in it, else float16."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def effective_rank(rank: int, shape: torch.Size, tokens: int, name: str) -> int:
    """Cut ``rank`` to what the shape (out, in) and the calibration tokens can carry, with a warning that says so."""
    limit = min(shape)
    if rank > limit:
        log.warning("%s: rank %d is above min(out, in) = %d of its %s weight; using rank %d.",
                    name, rank, limit, tuple(shape), limit)  # fmt: skip
        rank = limit
    if tokens < rank:
        what = f"rank {tokens}" if tokens else "no adapter"
        log.warning("%s: saw %d calibration tokens, too few for rank %d; using %s. "
                    "More calibration data, or data that reaches this module, gives it its full rank.",
                    name, tokens, rank, what)  # fmt: skip
        rank = tokens
    return rank


def compensate(
    weight: torch.Tensor,
    quantized: torch.Tensor,
    moment: SecondMoment | OutputErrorMoment,
    recipe: Recipe,
    *,
    name: str,
    cross_moment: CrossMoment | None = None,
) -> ModuleFactors:
    """Solve for the factors of one module, round them as they are stored, and measure what they buy.

    Args:
        weight: W, out × in, before quantisation.
        quantized: Ŵ, out × in, what the kernel will dequantise to.
        moment: second moment of the module's inputs; of its output error for a plain 16-bit "eora" where that is less.
        recipe: rank, objective and bits.
        name: full module name, for messages.
        cross_moment: inputs of the full-precision model beside these, for the objective "output". Without it, as for
            an expert that other tokens reach now, the module is compensated by "eora".

    Raises:
        ValueError: when the error or the activations hold NaN or infinity; the message names the module.
    """
    moment.require_finite()
    # A host may hold the two on different devices: the kernels of a checkpoint are spread over all GPUs.
    quantized = quantized.to(weight.device)
    delta = weight.to(torch.float32) - quantized.to(torch.float32)
    if not torch.isfinite(delta).all():
        raise ValueError(f"{name}: the weights hold NaN or infinity before or after quantisation.")
    rank = effective_rank(recipe.rank, delta.shape, moment.tokens, name)
    if recipe.factor_bits < 16 and rank % recipe.layout.multiple:
        whole = rank - rank % recipe.layout.multiple
        log.warning("%s: rank %d is no multiple of %d, as factors of %d bits are stored here; using rank %d.",
                    name, rank, recipe.layout.multiple, recipe.factor_bits, whole)  # fmt: skip
        rank = whole
    dtype = storage_dtype(weight.dtype)
    made = partial(ModuleFactors, requested_rank=recipe.rank, tokens=moment.tokens)
    if isinstance(moment, OutputErrorMoment):
        return _by_outputs(made, delta, moment, rank, dtype)
    second_moment = moment.mean(weight.device)
    signal, before = (weighted_energy(one, second_moment) for one in (weight.to(torch.float32), delta))
    packed = None
    target = delta
    if rank > 0:
        if recipe.objective == "output" and cross_moment is not None:
            target = output_target(weight, quantized, second_moment, cross_moment.mean(weight.device))
        lora_A, lora_B, metric = _solve(recipe.objective, target, second_moment, rank)
        if recipe.choose is not None:
            kept = recipe.choose(lora_A, lora_B, second_moment, delta)
            lora_A, lora_B, rank = lora_A[kept], lora_B[:, kept], len(kept)
            made = partial(made, requested_rank=rank)
    if rank == 0:
        lora_A, lora_B = _without_effect(delta, dtype)
    elif recipe.factor_bits == 16:
        lora_A, lora_B = _round(lora_A, lora_B, target, dtype)
    else:
        scaled = balance_together if recipe.layout.along_rank else balance
        packed = quantize_factors(target, metric, scaled(lora_A, lora_B)[0], recipe.factor_bits, recipe.layout)
        lora_A, lora_B = packed[0].dequantize(dtype), stored_B(packed[1], recipe.layout, dtype)
    after = energy_left(delta, second_moment, lora_A, lora_B, before)
    return made(lora_A=lora_A, lora_B=lora_B, packed=packed, signal=signal, error_before=before, error_after=after)


def _solve(
    objective: str, target: torch.Tensor, second_moment: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A, B, and the moment that the objective weighs the error by."""
    if objective == "svd":
        return *svd(target, rank), None
    if objective == "diagonal":
        energies = second_moment.diagonal()
        return *diagonal(target, energies, rank), energies
    return *eora(target, second_moment, rank), second_moment


def _round(lora_A: torch.Tensor, lora_B: torch.Tensor, target: torch.Tensor, dtype: torch.dtype) -> Factors:
    """Round B to ``dtype``, re-solve A against the rounded B, and round that."""
    rounded_B = round_to(balance(lora_A, lora_B)[1], dtype, "lora_B")
    return round_to(refit_A(target, rounded_B), dtype, "lora_A"), rounded_B


def _without_effect(delta: torch.Tensor, dtype: torch.dtype) -> Factors:
    return delta.new_zeros(0, delta.shape[1], dtype=dtype), delta.new_zeros(delta.shape[0], 0, dtype=dtype)


def _by_outputs(
    made: Callable[..., ModuleFactors],
    delta: torch.Tensor,
    moment: OutputErrorMoment,
    rank: int,
    dtype: torch.dtype,
) -> ModuleFactors:
    """The same from the moment of the output error.

    What is left: A, solved against the rounded B, equals P ΔW + E with P projecting onto B's span and E its own
    rounding, so the error left is (I − P) ΔW x, which S knows, and B E x. E is independent from entry to entry, so of C
    its energy needs only the diagonal.
    """
    error_moment = moment.mean(delta.device)
    wide_moment = error_moment.to(torch.float64)
    before = float(wide_moment.diagonal().sum())
    made = partial(made, signal=moment.signal, error_before=before)
    if rank == 0:
        lora_A, lora_B = _without_effect(delta, dtype)
        return made(lora_A=lora_A, lora_B=lora_B, error_after=before)
    lora_A, lora_B = _round(*eora_from_outputs(delta, error_moment, rank), delta, dtype)
    wide_B = lora_B.to(torch.float64)
    basis = orthonormal(wide_B)
    outside = before - float((basis * (wide_moment @ basis)).sum())
    rounding = lora_A.to(torch.float64) - refit_A(delta, lora_B)
    energies = moment.energies(delta.device).to(torch.float64)
    rounded = float((wide_B.T @ wide_B * ((rounding * energies) @ rounding.T)).sum())
    return made(lora_A=lora_A, lora_B=lora_B, error_after=max(outside, 0.0) + rounded)
