"""Statistics of module inputs, gathered in forward hooks. Knows tensors, no library."""

from .second_moment import SecondMoment, require_finite, shared_leaders

__all__ = ["SecondMoment", "require_finite", "shared_leaders"]
