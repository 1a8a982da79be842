"""Linear algebra that turns (error, second moment, rank) into low-rank factors. Imports torch, nothing else."""

from .eora import eora, eora_with_energy
from .factors import balance, round_to
from .metric import energy_left, weighted_energy

__all__ = ["balance", "energy_left", "eora", "eora_with_energy", "round_to", "weighted_energy"]
