"""Linear algebra that turns (error, second moment, rank) into low-rank factors. Imports torch, nothing else."""

from .allocate import MOST_STEPS, Curve, allocate, component_gains, error_loss, error_losses, price, rank_curve
from .error import energy_left, weighted_energy
from .factors import balance, refit_A, refit_B, round_to
from .gptq import ColumnOrder, Grid, column_order, gptq
from .objectives import diagonal, eora, eora_from_outputs, output, output_target, svd
from .quantized import GROUP_SIZE, QuantizedFactor, quantize_factors

__all__ = [
    "GROUP_SIZE",
    "MOST_STEPS",
    "ColumnOrder",
    "Curve",
    "Grid",
    "QuantizedFactor",
    "allocate",
    "balance",
    "column_order",
    "component_gains",
    "diagonal",
    "energy_left",
    "eora",
    "eora_from_outputs",
    "error_loss",
    "error_losses",
    "gptq",
    "output",
    "output_target",
    "price",
    "quantize_factors",
    "rank_curve",
    "refit_A",
    "refit_B",
    "round_to",
    "svd",
    "weighted_energy",
]
