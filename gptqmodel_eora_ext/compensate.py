"""One module's compensation: from its weights before and after quantisation to the factors that are stored."""

from __future__ import annotations

import logging

import torch

from .adapter import ModuleFactors
from .capture import SecondMoment
from .solve import balance, energy_left, eora_with_energy, round_to, weighted_energy

log = logging.getLogger(__name__)


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
    weight: torch.Tensor, quantized: torch.Tensor, moment: SecondMoment, rank: int, *, name: str
) -> ModuleFactors:
    """Solve for the factors of one module, round them as they are stored, and measure what they buy.

    Args:
        weight: W, out × in, before quantisation.
        quantized: Ŵ, out × in, what the kernel will dequantise to.
        moment: second moment of the module's inputs.
        rank: components asked for; 0 gives factors of no effect.
        name: full module name, for messages.

    Raises:
        ValueError: when the error or the activations hold NaN or infinity; the message names the module.
    """
    moment.require_finite()
    second_moment = moment.mean(weight.device)
    original = weight.to(torch.float32)
    delta = original - quantized.to(torch.float32)
    if not torch.isfinite(delta).all():
        raise ValueError(f"{name}: the weights hold NaN or infinity before or after quantisation.")
    dtype = storage_dtype(weight.dtype)
    asked = rank
    rank = effective_rank(rank, delta.shape, moment.tokens, name)
    if rank == 0:
        lora_A, lora_B = delta.new_zeros(0, delta.shape[1]), delta.new_zeros(delta.shape[0], 0)
        before = weighted_energy(delta, second_moment)
    else:
        lora_A, lora_B, before = eora_with_energy(delta, second_moment, rank)
        lora_A, lora_B = balance(lora_A, lora_B)
    lora_A, lora_B = round_to(lora_A, lora_B, dtype)
    return ModuleFactors(
        lora_A=lora_A,
        lora_B=lora_B,
        requested_rank=asked,
        tokens=moment.tokens,
        signal=weighted_energy(original, second_moment),
        error_before=before,
        error_after=energy_left(delta, second_moment, lora_A, lora_B, before),
    )
