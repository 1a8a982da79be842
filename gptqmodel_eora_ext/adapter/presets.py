"""Settings by their measured gain and cost (docs/budget.md), for whoever asks for nothing or little."""

from __future__ import annotations

from dataclasses import dataclass

from .vocabulary import UNIFORM

# Bits per quantised weight.
DEFAULT_BUDGET = "0.5bpw"
DEFAULT_PRESET = "balanced"


@dataclass(frozen=True)
class Preset:
    """Settings that go together.

    Attributes:
        factor_bits: of the stored factors.
        sensitivity: what ranks under a budget go by; `UNIFORM` for one rank for all.
        rounds: times that a module is quantised.
    """

    factor_bits: int
    sensitivity: str
    rounds: int


# All in 4-bit factors: in the same bytes they recover more than 16-bit ones in every cell that was measured.
PRESETS = {
    "fast": Preset(factor_bits=4, sensitivity=UNIFORM, rounds=1),
    "balanced": Preset(factor_bits=4, sensitivity="fisher", rounds=1),
    "best": Preset(factor_bits=4, sensitivity="fisher", rounds=3),
}
