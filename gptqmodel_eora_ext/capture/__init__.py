"""Statistics of module inputs, gathered in forward hooks. Knows tensors, no library."""

from .output_error import OutputErrorMoment
from .routed import RoutedRows
from .second_moment import CrossMoment, DiagonalMoment, SecondMoment, require_finite, shared_leaders

__all__ = ["CrossMoment", "DiagonalMoment", "OutputErrorMoment", "RoutedRows", "SecondMoment", "require_finite",
           "shared_leaders"]  # fmt: skip
