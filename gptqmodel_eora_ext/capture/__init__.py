"""Statistics of module inputs, gathered in forward hooks. Knows tensors, no library."""

from .output_error import OutputErrorMoment
from .second_moment import CrossMoment, SecondMoment, require_finite, shared_leaders

__all__ = ["CrossMoment", "OutputErrorMoment", "SecondMoment", "require_finite", "shared_leaders"]
