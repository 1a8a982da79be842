"""Linear algebra that turns (error, second moment, rank) into low-rank factors. Imports torch, nothing else."""

from .error import energy_left, weighted_energy
from .factors import balance, refit_A, refit_B, round_to
from .objectives import diagonal, eora, eora_from_outputs, output, output_target, svd
from .quantized import GROUP_SIZE, QuantizedFactor, quantize_factors

__all__ = [
    "GROUP_SIZE",
    "QuantizedFactor",
    "balance",
    "diagonal",
    "energy_left",
    "eora",
    "eora_from_outputs",
    "output",
    "output_target",
    "quantize_factors",
    "refit_A",
    "refit_B",
    "round_to",
    "svd",
    "weighted_energy",
]
