"""Statistics of module inputs, gathered in forward hooks. Knows tensors, no library."""

from .ordered import OrderedMoment, OrderedOutputError, chained, panels_of
from .output_error import OutputErrorMoment
from .routed import RoutedRows
from .second_moment import CrossMoment, DiagonalMoment, SecondMoment, require_finite, shared_leaders

__all__ = ["CrossMoment", "DiagonalMoment", "OrderedMoment", "OrderedOutputError", "OutputErrorMoment", "RoutedRows",
           "SecondMoment", "chained", "panels_of", "require_finite", "shared_leaders"]  # fmt: skip
