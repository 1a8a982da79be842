"""What is asked of a refinement, and how many tokens and steps that makes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..adapter.options import in_python
from ..adapter.validate import validate_choice, validate_count
from .losses import LOSSES

DEFAULT_LOSS = "kl"
# No loss of its own, but one step in place of a training loop (`natural`).
NATURAL = "natural"
CHOICES = (*LOSSES, NATURAL)
DEFAULT_TOKENS = 160_000
# Of "natural", which wants moments of full rank and takes each token there and back twice.
NATURAL_TOKENS = 16_384
DEFAULT_WINDOW = 512
# Windows that are not trained on, one in so many, and how many of them at most: each costs a forward at every
# validation, and the difference of two states on 24 windows of 512 tokens is known to some 0.003 nats.
VALIDATED_SHARE, MOST_VALIDATED = 5, 24
# Of which a smaller number of windows could not be split.
LEAST_WINDOWS = VALIDATED_SHARE
# About how far a value moves in the first step; the grid of 4-bit factors is some 0.03 wide.
LEARNING_RATE = 1e-3
NUMBER = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[kKmM]?)")
UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
FORM = "a number such as 160000, `160k` or `1.5M`"


@dataclass(frozen=True)
class RefineSettings:
    """Settings of a refinement that hold together.

    Attributes:
        loss: one of `CHOICES`.
        tokens: of calibration, those that validate included.
        window: tokens in a window.
        learning_rate: of the first step; None for "natural", whose step is chosen by validation.
        seed: of the order of the windows.
        passes: how many times each window that trains is used; 1 for "natural".
    """

    loss: str = DEFAULT_LOSS
    tokens: int = DEFAULT_TOKENS
    window: int = DEFAULT_WINDOW
    learning_rate: float | None = LEARNING_RATE
    seed: int = 0
    passes: int = 1

    @classmethod
    def settle(
        cls,
        *,
        loss: Any = None,
        tokens: Any = None,
        window: Any = None,
        learning_rate: Any = None,
        seed: Any = None,
        passes: Any = None,
        label: Callable[[str], str] = in_python,
    ) -> RefineSettings:
        """What was asked, else the defaults. None stands for "not asked".

        Raises:
            ValueError: for a value out of range; the message names it by ``label``.
        """
        window = DEFAULT_WINDOW if window is None else validate_count(window, what=label("window"), minimum=2)
        loss = validate_choice(DEFAULT_LOSS if loss is None else loss, CHOICES, what=label("loss"))
        default = NATURAL_TOKENS if loss == NATURAL else DEFAULT_TOKENS
        tokens = default if tokens is None else parse_tokens(tokens, what=label("tokens"))
        if tokens < LEAST_WINDOWS * window:
            raise ValueError(
                f"{label('tokens')} must fill at least {LEAST_WINDOWS} windows of {window}, of which one validates; "
                f"got {tokens}. Name {LEAST_WINDOWS * window} or more."
            )
        passes = 1 if passes is None else validate_count(passes, what=label("passes"))
        if loss == NATURAL:
            if passes != 1:
                raise ValueError(f"{label('passes')} has no meaning with the loss {NATURAL!r}, which takes one step. "
                                 f"Leave it out.")  # fmt: skip
            if learning_rate is not None:
                raise ValueError(
                    f"{label('learning_rate')} has no meaning with the loss {NATURAL!r}, which takes one step, whose "
                    f"size validation chooses. Leave it out."
                )
            return cls(loss, tokens, window, None, _seed(seed, label))
        rate = LEARNING_RATE if learning_rate is None else learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not (0 < rate < math.inf):
            name = label("learning_rate")
            raise ValueError(f"{name} must be a number above 0, got {rate!r}; {LEARNING_RATE} is usual.")
        return cls(
            loss=loss,
            tokens=tokens,
            window=window,
            learning_rate=float(rate),
            seed=_seed(seed, label),
            passes=passes,
        )

    @classmethod
    def of(cls, asked: Any, *, what: str) -> RefineSettings | None:
        """Settings out of what a user may write: tokens (160000, "160k"), a mapping of settings, or None for none.

        Raises:
            ValueError: for a value out of range, or a setting that is not known.
        """
        if asked is None or isinstance(asked, cls):
            return asked
        if not isinstance(asked, Mapping):
            return cls.settle(tokens=asked, label=lambda option: what)
        known = [one.name for one in fields(cls)]
        if unknown := sorted(set(asked) - set(known)):
            raise ValueError(f"{what} takes {', '.join(known)}; got {', '.join(map(str, unknown))}.")
        return cls.settle(**asked, label=lambda option: f"{what}: `{option}`")

    @property
    def least_windows(self) -> int:
        """Windows without which there is nothing to validate on."""
        return LEAST_WINDOWS

    @property
    def windows(self) -> int:
        """Windows that the tokens fill."""
        return self.tokens // self.window


def _seed(asked: Any, label: Callable[[str], str]) -> int:
    return 0 if asked is None else validate_count(asked, what=label("seed"), minimum=0)


def parse_tokens(asked: Any, *, what: str) -> int:
    """Tokens as a number, of `160000`, `"160k"` or `"1.5M"`.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(asked, str):
        match = NUMBER.fullmatch(asked.strip())
        if match is None:
            raise ValueError(f"{what} must be {FORM}, got {asked!r}.")
        return int(float(match["number"]) * UNITS[match["unit"].lower()])
    return validate_count(asked, what=what)


def validated(windows: int) -> int:
    """How many of the windows validate."""
    return max(1, min(windows // VALIDATED_SHARE, MOST_VALIDATED))
