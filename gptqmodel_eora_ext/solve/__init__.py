"""Linear algebra that turns (error, second moment, rank) into low-rank factors. Imports torch, nothing else."""

from .eora import eora
from .factors import balance, round_to
from .metric import weighted_energy

__all__ = ["balance", "eora", "round_to", "weighted_energy"]
