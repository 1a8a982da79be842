"""The words that options are made of."""

from __future__ import annotations

# In place of a rank: every module gets the rank that buys most under a budget.
AUTO = "auto"
# What makes the errors of different modules comparable when ranks are chosen.
SENSITIVITIES = ("fisher", "empirical", "relative")
# In their place: one rank for all modules, the largest that the budget allows.
UNIFORM = "uniform"
OBJECTIVES = ("eora", "svd", "diagonal", "output")
FACTOR_BITS = (16, 8, 4)
# Where a host, or the demo, asks for a rank and the user names none.
DEFAULT_RANK = 32
