"""`EoRAConfig`: what AutoRound's users put into `alg_configs` beside their quantiser."""

from __future__ import annotations

import os
from typing import Any

from auto_round.algorithms.quantization.config import QuantizationConfig

from ...adapter.budget import FORM
from ...adapter.options import AdapterOptions
from ...adapter.vocabulary import DEFAULT_RANK, FACTOR_BITS, OBJECTIVES, SENSITIVITIES, UNIFORM
from ...loop.resume import Keeping
from ...plan import Plan, plan_to_follow

NAME = "eora"
# "output" pairs a module's input with the full-precision model's; AutoRound's loop keeps one of them at a time.
LOOP_OBJECTIVES = tuple(name for name in OBJECTIVES if name != "output")
LOOP_SENSITIVITIES = (*SENSITIVITIES, UNIFORM)


class EoRAConfig(QuantizationConfig):
    """Compensate each block right after AutoRound has quantised it. The string "eora" stands for the defaults.

    Args:
        rank: components per module; 32 where neither it nor ``budget`` nor ``plan`` is given. A rank above min(out, in)
            of a module is cut to that, with a warning.
        budget: in place of a rank: bytes of all factors, as a number or "300MB", "0.25bpw" or "r32". Each module gets
            the rank that takes most off the loss.
        sensitivity: for a budget, what an error in a module is taken to cost: "fisher", "empirical" or "relative";
            "uniform" for one rank for all.
        objective: what the factors minimise: "eora", "diagonal" or "svd".
        factor_bits: 16 for a plain PEFT adapter; 8 or 4 for packed integers, which need this plugin to load.
        plan: a `Plan` of `eora plan`, or its file, in place of ``rank``: the ranks and the bits of the factors.
            AutoRound has to be given the plan's widths, `AutoRound(…, **plan.autoround_config())`.
        scheme_options: what AutoRound passes to every algorithm (`bits`, `group_size`, …); the quantiser's are used.

    Raises:
        ValueError: for a rank that is no positive integer, a rank beside a budget, a plan beside either or without any
            adapter, a budget in no known form, or an unknown objective, sensitivity or width.

    Example:
        >>> from auto_round import AutoRound
        >>> rounder = AutoRound("Qwen/Qwen3-8B", scheme="W2A16", alg_configs=["signround", EoRAConfig(rank=64)])
        >>> rounder.quantize_and_save("out", format="auto_round")  # the adapter goes into the folder `eora` of `out`
    """

    need_calib = True

    @classmethod
    def register_args(cls, registry: Any) -> None:
        """Declare the flags of AutoRound's command line."""
        registry.add_argument(
            "--eora-rank", field="rank", default=None, type=int,
            help=f"EoRA: components per module; {DEFAULT_RANK} without --eora-budget.",
        )  # fmt: skip
        registry.add_argument(
            "--eora-budget", field="budget", default=None, type=str, help=f"EoRA, in place of a rank: bytes, {FORM}."
        )
        registry.add_argument(
            "--eora-plan", field="plan", default=None, type=str,
            help="EoRA, in place of a rank: a plan.json of `eora plan`. Its widths go into --layer_config; "
                 "`eora quantize --quantizer autoround --plan` does both.",
        )
        registry.add_argument(
            "--eora-sensitivity", field="sensitivity", default=SENSITIVITIES[0], choices=list(LOOP_SENSITIVITIES),
            help="EoRA, for a budget: what an error in a module is taken to cost; uniform for one rank for all.",
        )  # fmt: skip
        registry.add_argument(
            "--eora-objective", field="objective", default=LOOP_OBJECTIVES[0], choices=list(LOOP_OBJECTIVES),
            help="EoRA: what the factors minimise.",
        )  # fmt: skip
        registry.add_argument(
            "--eora-factor-bits", field="factor_bits", default=FACTOR_BITS[0], type=int, choices=list(FACTOR_BITS),
            help="EoRA: bits of a stored factor; 16 is a plain PEFT adapter.",
        )  # fmt: skip

    def __init__(
        self,
        *,
        rank: int | None = None,
        budget: int | str | None = None,
        sensitivity: str = SENSITIVITIES[0],
        objective: str = LOOP_OBJECTIVES[0],
        factor_bits: int = FACTOR_BITS[0],
        plan: Plan | str | os.PathLike[str] | None = None,
        **scheme_options: Any,
    ) -> None:
        super().__init__(**scheme_options)
        self.rank = rank
        self.budget = budget
        self.sensitivity = sensitivity
        self.objective = objective
        self.factor_bits = factor_bits
        self.plan = plan
        # Where finished blocks are kept; set by our commands. Others name `AR_RESUME_DIR`.
        self.keeping: Keeping | None = None
        self.validate()

    def validate(self) -> None:
        """Check all options; AutoRound sets some after construction, where they are passed to it directly.

        Raises:
            ValueError: see the class.
        """
        if self.objective == "output":
            raise ValueError(
                'EoRA: objective "output" needs the full-precision and the quantised model\'s inputs side by side, '
                'which AutoRound\'s loop does not keep. Use "eora", or `eora generate` on the finished checkpoint.'
            )
        rank, factor_bits = self.rank, self.factor_bits
        self.followed = None if self.plan is None else plan_to_follow(self.plan, rank=rank, budget=self.budget)
        if self.followed is not None:
            rank, factor_bits = self.followed.largest_rank, self.followed.factor_bits
        self.settled = AdapterOptions.settle(
            rank=DEFAULT_RANK if rank is None and self.budget is None else rank,
            budget=self.budget,
            objective=self.objective,
            factor_bits=factor_bits,
            sensitivity=self.sensitivity,
            objectives=LOOP_OBJECTIVES,
        )

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.options().items())
        return f"EoRAConfig({shown})"

    def options(self) -> dict[str, Any]:
        """What was asked, ready for JSON."""
        return self.settled.described()
