"""Linear algebra that turns (error, second moment, rank) into low-rank factors. Knows torch and `formats` alone."""

from .allocate import (
    MOST_STEPS,
    Curve,
    allocate,
    component_gains,
    directions,
    error_loss,
    halves,
    halves_loss,
    output_error,
    output_gains,
    output_loss,
    price,
    rank_curve,
)
from .decompositions import NotDefinite, invert_upper, one_thread, orthonormal, upper_root
from .error import energy_left, multiplies_bfloat16, square_root, weighted_energy
from .factors import balance, balance_together, refit_A, refit_B, round_to
from .gptq import ColumnOrder, Grid, column_order, gptq
from .moments import Moment, RowMoment, diagonal_of
from .objectives import diagonal, eora, eora_from_outputs, output, output_target, svd
from .pruning import MAGNITUDE, METHODS, SPARSEGPT, WANDA, prune, sparsegpt, sparsegpt_codes
from .quantized import quantize_factors, stored_B

__all__ = [
    "MAGNITUDE",
    "METHODS",
    "MOST_STEPS",
    "SPARSEGPT",
    "WANDA",
    "ColumnOrder",
    "Curve",
    "Grid",
    "Moment",
    "NotDefinite",
    "RowMoment",
    "allocate",
    "balance",
    "balance_together",
    "column_order",
    "component_gains",
    "diagonal",
    "diagonal_of",
    "directions",
    "energy_left",
    "eora",
    "eora_from_outputs",
    "error_loss",
    "gptq",
    "halves",
    "halves_loss",
    "invert_upper",
    "multiplies_bfloat16",
    "one_thread",
    "orthonormal",
    "output",
    "output_error",
    "output_gains",
    "output_loss",
    "output_target",
    "price",
    "prune",
    "quantize_factors",
    "rank_curve",
    "refit_A",
    "refit_B",
    "round_to",
    "sparsegpt",
    "sparsegpt_codes",
    "square_root",
    "stored_B",
    "svd",
    "upper_root",
    "weighted_energy",
]
