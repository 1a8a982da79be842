"""Training an adapter's factors together, by what the whole quantised model loses (docs/refinement.md)."""

from .linear import FrozenWeight
from .losses import LOSSES
from .outcome import COMPLETE, INTERRUPTED, Outcome
from .run import RefineJob, describe, refine_adapter, refine_factors
from .settings import DEFAULT_LOSS, DEFAULT_TOKENS, DEFAULT_WINDOW, RefineSettings
from .student import Trainee

__all__ = ["COMPLETE", "DEFAULT_LOSS", "DEFAULT_TOKENS", "DEFAULT_WINDOW", "INTERRUPTED", "LOSSES", "FrozenWeight",
           "Outcome", "RefineJob", "RefineSettings", "Trainee", "describe", "refine_adapter",
           "refine_factors"]  # fmt: skip
