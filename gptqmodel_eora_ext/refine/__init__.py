"""Training an adapter's factors together, by what the whole quantised model loses (docs/refinement.md)."""

from .linear import FrozenWeight
from .outcome import COMPLETE, INTERRUPTED, Outcome
from .run import RefineJob, begin, describe, refine_adapter, refine_factors
from .settings import CHOICES, DEFAULT_LOSS, DEFAULT_TOKENS, DEFAULT_WINDOW, NATURAL_TOKENS, RefineSettings
from .student import Trainee

__all__ = ["CHOICES", "COMPLETE", "DEFAULT_LOSS", "DEFAULT_TOKENS", "DEFAULT_WINDOW", "INTERRUPTED", "NATURAL_TOKENS",
           "FrozenWeight",
           "Outcome", "RefineJob", "RefineSettings", "Trainee", "begin", "describe", "refine_adapter",
           "refine_factors"]  # fmt: skip
