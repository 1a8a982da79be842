"""What needs gradients of the full-precision model."""

from .sensitivity import Sensitivity, measure_sensitivity

__all__ = ["Sensitivity", "measure_sensitivity"]
