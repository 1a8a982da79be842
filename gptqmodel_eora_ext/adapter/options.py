"""What is asked of an adapter, apart from any host: one set of rules for GPTQModel, AutoRound and the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..formats.factors import PACKED_LAYOUT, FactorLayout
from .budget import parse_budget
from .presets import DEFAULT_BUDGET, DEFAULT_PRESET, PRESETS, Preset
from .validate import validate_choice, validate_count, validate_rank
from .vocabulary import AUTO, FACTOR_BITS, OBJECTIVES, SENSITIVITIES, UNIFORM

# What neither a preset nor the user names: one round of plain PEFT factors, ranks under a budget by gradients.
PLAIN = Preset(factor_bits=FACTOR_BITS[0], sensitivity=SENSITIVITIES[0], rounds=1)


def in_python(option: str) -> str:
    """How a message names an option of `EoRA` or `EoRAConfig`."""
    return f"EoRA: `{option}`"


def as_flag(option: str) -> str:
    """How a message names an option of the command."""
    return f"--{option.replace('_', '-')}"


@dataclass(frozen=True)
class AdapterOptions:
    """Options that hold together.

    Attributes:
        rank: components per module; `AUTO` under a budget; None where nothing was asked.
        budget: bytes of all factors, in a form of `budget.FORM`; None beside a rank.
        objective: of `OBJECTIVES`.
        factor_bits: of `FACTOR_BITS`.
        sensitivity: of `SENSITIVITIES`, or `UNIFORM`.
        rounds: times that a module is quantised.
        preset: of `PRESETS`; None where none was named.
        asked_rounds: whether the rounds were asked for by number, not by a preset.
        layout: of the file that the factors are for.
    """

    rank: int | str | None
    budget: int | str | None
    objective: str
    factor_bits: int
    sensitivity: str
    rounds: int
    preset: str | None
    asked_rounds: bool
    layout: FactorLayout = PACKED_LAYOUT

    @classmethod
    def settle(
        cls,
        *,
        rank: Any = None,
        budget: Any = None,
        objective: Any = None,
        factor_bits: Any = None,
        sensitivity: Any = None,
        rounds: Any = None,
        preset: Any = None,
        objectives: Sequence[str] = OBJECTIVES,
        label: Callable[[str], str] = in_python,
    ) -> AdapterOptions:
        """What was asked, else what the preset says, else `PLAIN`. None stands for "not asked".

        Args:
            objectives: that the host can serve.
            label: names an option in a message.

        Raises:
            ValueError: for a value out of range, a rank beside a budget, or a budget beside an objective whose
                components cannot be weighed.
        """
        known = PLAIN if preset is None else PRESETS[validate_choice(preset, PRESETS, what=label("preset"))]
        if rank is not None and rank != AUTO:
            rank = validate_rank(rank, what=label("rank"))
            if budget is not None:
                raise ValueError(
                    f"{label('rank')} and {label('budget')} exclude each other; got {rank!r} and {budget!r}. "
                    f'A budget, for instance "0.25bpw", chooses the ranks.'
                )
        elif rank is None and (budget is not None or preset is not None):
            rank = AUTO
        if rank == AUTO:
            budget = DEFAULT_BUDGET if budget is None else budget
            parse_budget(budget, what=label("budget"))
        chosen = OBJECTIVES[0] if objective is None else objective
        chosen = validate_choice(chosen, objectives, what=label("objective"))
        if rank == AUTO and chosen != OBJECTIVES[0]:
            raise ValueError(
                f'{label("budget")} weighs the components of objective "{OBJECTIVES[0]}", got objective={chosen!r}. '
                f"Name a rank, or leave the objective out."
            )
        return cls(
            rank=rank,
            budget=budget,
            objective=chosen,
            factor_bits=validate_choice(
                known.factor_bits if factor_bits is None else factor_bits, FACTOR_BITS, what=label("factor_bits")
            ),
            sensitivity=validate_choice(
                known.sensitivity if sensitivity is None else sensitivity, (*SENSITIVITIES, UNIFORM),
                what=label("sensitivity"),
            ),
            rounds=validate_count(known.rounds if rounds is None else rounds, what=label("rounds")),
            preset=preset,
            asked_rounds=rounds is not None,
        )  # fmt: skip

    def for_making(self, **asked: Any) -> AdapterOptions:
        """The same where a rank or budget was asked; the default preset's where neither was.

        Args:
            asked: what `settle` was called with; it goes before the preset.
        """
        if self.rank is not None:
            return self
        return AdapterOptions.settle(**{**asked, "budget": DEFAULT_BUDGET, "preset": DEFAULT_PRESET})

    def described(self) -> dict[str, Any]:
        """Rank, objective, width and, under a budget, what it is given out by: ready for JSON."""
        common = {"rank": self.rank, "objective": self.objective, "factor_bits": self.factor_bits}
        return common if self.rank != AUTO else {**common, "budget": self.budget, "sensitivity": self.sensitivity}
