"""Statistics of module inputs, gathered in forward hooks. Knows tensors, no library."""

from .second_moment import SecondMoment, shared_leaders

__all__ = ["SecondMoment", "shared_leaders"]
