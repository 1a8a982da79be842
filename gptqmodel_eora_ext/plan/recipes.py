"""Recipes: for a total size and an effort, the quantiser, widths, adapter and refinement.

`TABLE` is data. Each row says where its losses were measured (`benchmarks/recipes.py`, `benchmarks/plan.py`), or that
they were not yet and what it was chosen by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..adapter.budget import budget_bytes
from ..adapter.validate import validate_choice
from ..formats.sizes import ModuleShape
from ..solve import Grid
from .file import QUANTIZERS, Plan
from .modules import PLANNED_BITS, bits_per_weight, plain_bytes
from .ranks import least_budget

EFFORTS = FAST, BALANCED, BEST = ("fast", "balanced", "best")
GPTQ, AUTOROUND = QUANTIZERS
# All recipes plan widths and ranks by forecasts of the Fisher information, in groups that SmolLM2's 576 inputs are
# whole numbers of, with factors in the width that recovers most for its bytes (docs/budget.md).
SENSITIVITY = "fisher"
GROUP_SIZE = 64
FACTOR_BITS = 4
# GPTQModel's search for scales; of 2-bit errors it takes a third off (docs/budget.md).
SCALE_SEARCH = 2.4
GRID = Grid(GROUP_SIZE, True, SCALE_SEARCH)
# Beyond the widest weights and so much of factors, more of them is not known to help: 4 bits and 0.19 bpw of factors
# are the largest model that was measured, and it loses 0.13 and 0.10 nats (docs/budget.md).
LARGEST_ADAPTER = 0.25


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        effort: of `EFFORTS`.
        up_to: the largest total that it is for, in bits per quantised weight.
        quantizer: "gptq" (GPTQModel) or "autoround".
        adapter: bits per quantised weight that are kept for factors; 0 leaves it to the plan's forecasts.
        tuning: AutoRound's settings, `iters` (steps a block) among them; none with GPTQ.
        refine: tokens that the factors are trained on afterwards; 0 for none.
        why: what the choice rests on.
        source: the file of results that ``losses`` come from; empty where nothing was measured.
        losses: total in bits per weight → nats a token that SmolLM2 loses on held-out WikiText-2 and C4.
    """

    effort: str
    up_to: float
    quantizer: str
    adapter: float
    tuning: Mapping[str, Any]
    refine: int
    why: str
    source: str = ""
    losses: Mapping[float, tuple[float, float]] = field(default_factory=dict)


EVERY = float("inf")
# AutoRound's second version of sign-SGD. Of the first's error in the outputs of SmolLM2's first three blocks, 2 bits,
# 50 steps, 64 windows of 256 tokens, it leaves 76, 73 and 60 %, in 1.05 times the time.
EXTENDED = {"enable_alg_ext": True}
# Whose losses widths and ranks are planned by, whichever quantiser then runs them. `eora plan --quantizer autoround`
# takes the time of AutoRound on 9 layers more, and whether its mixes are better was not measured.
PLANNED_FOR = GPTQ
# AutoRound's own default of windows a step. GPTQ sums over windows, and their number a step changes memory alone.
AUTOROUND_BATCH, GPTQ_BATCH = 8, 1

TABLE = (
    Row(
        FAST, EVERY, GPTQ, adapter=0.0, tuning={}, refine=0,
        why="planned mixes beat every uniform choice of their size that GPTQ makes",
        source="benchmarks/results/plan.json",
        losses={2.5: (1.70, 1.52), 2.75: (1.23, 1.02), 3.0: (0.89, 0.70), 3.25: (0.62, 0.46), 3.5: (0.44, 0.31),
                3.75: (0.30, 0.22)},
    ),
    Row(
        BALANCED, EVERY, AUTOROUND, adapter=0.22, tuning={"iters": 50, **EXTENDED}, refine=80_000,
        why="AutoRound at 2 bits loses less than GPTQ does, and most of what refinement wins comes early (72 % in 54 "
            "of 136 steps: benchmarks/results/refine.json); the whole was not measured",
    ),
    Row(
        BEST, EVERY, AUTOROUND, adapter=0.22, tuning={"iters": 50, **EXTENDED}, refine=200_000,
        why="at 2.5 bpw AutoRound with an adapter in its loop, refined, loses half of what the planned mix of GPTQ "
            "does, and on C4 less than plain 3 bits at 3.30; larger sizes were not measured",
        source="benchmarks/results/recipes.json",
        losses={2.5: (0.80, 0.45)},
    ),
)  # fmt: skip

# Seconds of one thread, on SmolLM2 and a Xeon of 2023 with bfloat16 (docs/recipes.md): for each weight, what planning
# and GPTQ take, and for each weight and token what AutoRound's steps and refinement take.
PLAN_SECONDS, GPTQ_SECONDS = 1.7e-6, 2.0e-6
AUTOROUND_SECONDS, REFINE_SECONDS = 5.1e-11, 1.8e-10


@dataclass(frozen=True)
class Recipe:
    """What a total and an effort come to for one model. `str()` says it in words.

    Attributes:
        row: of the table.
        total: bytes of weights, scales, zeros and factors.
        weights: quantised weights.
    """

    row: Row
    total: int
    weights: int

    @property
    def bpw(self) -> float:
        """Bits of the total for each quantised weight."""
        return 8 * self.total / self.weights

    @property
    def adapter(self) -> int:
        """Bytes that are kept for factors."""
        return int(self.row.adapter * self.weights / 8)

    @property
    def batch_size(self) -> int:
        """Windows a step of AutoRound, or a forward of GPTQ."""
        return AUTOROUND_BATCH if self.row.quantizer == AUTOROUND else GPTQ_BATCH

    def settings(self, plan: Plan, form: str) -> dict[str, Any]:
        """What the quantiser is given beside the plan.

        Args:
            plan: to run.
            form: AutoRound's export.
        """
        if self.row.quantizer == GPTQ:
            return plan.quantize_config()
        return {"bits": plan.bits, "format": form, **self.row.tuning}

    def seconds(self, seqlen: int) -> float:
        """About how long it takes, on one thread of the processor that it was timed on.

        Args:
            seqlen: tokens of a calibration window.
        """
        tuned = self.row.tuning.get("iters", 0) * self.batch_size * seqlen
        rounding = AUTOROUND_SECONDS * tuned if self.row.quantizer == AUTOROUND else GPTQ_SECONDS
        return self.weights * (PLAN_SECONDS + rounding + REFINE_SECONDS * self.row.refine)

    def described(self) -> dict[str, str]:
        """What it is and why, by short names."""
        row = self.row
        widths = ", ".join(map(str, PLANNED_BITS[:-1])) + f" or {PLANNED_BITS[-1]}"
        how = f"AutoRound, {row.tuning['iters']} steps a block" if row.tuning else "GPTQ, with its search for scales"
        kept = f"at least {row.adapter:g} bpw where 2 bits leave that" if row.adapter else "where forecasts say it pays"
        return {
            "recipe": f"{row.effort}, {self.bpw:.3f} bpw of {self.weights:,} weights",
            "weights": f"{how}; {widths} bits a module as planned, in groups of {GROUP_SIZE}",
            "adapter": f"{FACTOR_BITS}-bit factors, ranks as planned; {kept}",
            "refine": f"on {row.refine:,} tokens" if row.refine else "no",
            "why": row.why,
            "measured": self._measured(),
        }

    def _measured(self) -> str:
        if not self.row.losses:
            return "not yet as a whole"
        nearest = min(self.row.losses, key=lambda total: abs(total - self.bpw))
        wikitext2, c4 = self.row.losses[nearest]
        return (f"SmolLM2 loses {wikitext2:.2f} nats on WikiText-2 and {c4:.2f} on C4 at {nearest:g} bpw "
                f"({self.row.source})")  # fmt: skip

    def __str__(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in self.described().items())


def recipe_of(total: int | str, effort: str, shapes: Sequence[ModuleShape], *, what: str = "total") -> Recipe:
    """The recipe that the table has for a size.

    Args:
        total: bytes of weights, scales, zeros and factors, or "2.75bpw" or "300MB".
        effort: "fast", "balanced" or "best".
        shapes: the modules that would be quantised.
        what: names the total in a message.

    Raises:
        ValueError: for an unknown effort, or a total that no recipe reaches; the message names the least and the
            largest that one does.

    Example:
        >>> recipe_of("2.75bpw", "best", shapes).row.quantizer
        'autoround'
    """
    validate_choice(effort, EFFORTS, what="effort")
    size = budget_bytes(total, shapes)
    weights = sum(shape.weights for shape in shapes)
    least = plain_bytes(shapes, PLANNED_BITS[0], GROUP_SIZE) + least_budget(shapes, FACTOR_BITS)
    largest = plain_bytes(shapes, PLANNED_BITS[-1], GROUP_SIZE) + int(LARGEST_ADAPTER * weights / 8)
    if not least <= size <= largest:
        shown = " to ".join(f"{bits_per_weight(shapes, one):.3f} bpw ({one} bytes)" for one in (least, largest))
        raise ValueError(
            f"{what} {total} is {bits_per_weight(shapes, size):.3f} bpw ({size} bytes) of this model; recipes reach "
            f"{shown}. Name a total between them, or the bits themselves (--bits)."
        )
    bpw = bits_per_weight(shapes, size)
    return Recipe(next(row for row in TABLE if row.effort == effort and bpw <= row.up_to), size, weights)
