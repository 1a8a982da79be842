"""PEFT's patterns over module names, evaluated without backtracking.

`adapter_config.json` may hold regular expressions (`rank_pattern`, `target_modules`, …), and an adapter comes from
anywhere. Python's `re` tries one way after another, so that a short expression such as `(([a-z]+)+)+!` keeps it busy
for longer than anybody waits. Here an expression is parsed by Python's own parser and walked over with the set of all
positions that a match can have reached. That gives the same answer in a number of steps that is bounded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as op  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as op
    import sre_parse as parser

# Real names of modules and patterns over them take some tens of characters; far beyond that a file is not an adapter's.
LONGEST_PATTERN = 1000
# Groups and repeats inside each other; Python's own stack ends at some hundreds.
DEEPEST = 50
# Steps for one pattern and one name. A pattern that a person wrote takes some hundreds.
MOST_STEPS = 100_000
# A name, perhaps anchored and with its dots escaped: told apart from other expressions because an adapter with a rank a
# module has thousands of them, and they can be looked up.
LITERAL = re.compile(r"(\^?)([\w-]+(?:\\?\.[\w-]+)*)\$?")
CATEGORIES = {
    op.CATEGORY_DIGIT: (str.isdecimal, True),
    op.CATEGORY_NOT_DIGIT: (str.isdecimal, False),
    op.CATEGORY_SPACE: (str.isspace, True),
    op.CATEGORY_NOT_SPACE: (str.isspace, False),
    op.CATEGORY_WORD: (lambda sign: sign.isalnum() or sign == "_", True),
    op.CATEGORY_NOT_WORD: (lambda sign: sign.isalnum() or sign == "_", False),
}


class PatternError(ValueError):
    """A pattern that is no regular expression, or one that is not evaluated here; the message says why."""


class Pattern:
    """One regular expression.

    Args:
        text: in Python's syntax.

    Raises:
        PatternError: when it is too long, no regular expression, or uses what cannot be matched by positions alone:
            look-around, back references, word boundaries, flags.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > LONGEST_PATTERN:
            raise PatternError(f"it has {len(text)} characters, at most {LONGEST_PATTERN} are read")
        try:
            tree = parser.parse(text)
            self._tree: Any = list(tree)
            self._check(self._tree, DEEPEST)
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"it is no regular expression ({error})") from error
        if tree.state.flags & ~re.UNICODE:
            raise PatternError("it sets flags, which are not supported here")

    def matches(self, name: str, starts: Iterable[int] = (0,)) -> bool:
        """Whether the expression matches ``name`` from one of ``starts`` up to its end.

        Raises:
            PatternError: when that takes more than `MOST_STEPS`.
        """
        self._name, self._steps = name, 0
        return len(name) in self._sequence(self._tree, set(starts))

    def _check(self, tree: Iterable[Any], depth: int) -> None:
        if not depth:
            raise PatternError(f"its groups are more than {DEEPEST} deep")
        for code, argument in tree:
            if code in (op.MAX_REPEAT, op.MIN_REPEAT):
                self._check(argument[2], depth - 1)
            elif code is op.SUBPATTERN:
                if argument[1] or argument[2]:
                    raise PatternError("it sets flags, which are not supported here")
                self._check(argument[3], depth - 1)
            elif code is op.BRANCH:
                for branch in argument[1]:
                    self._check(branch, depth - 1)
            elif code is op.AT and argument in (op.AT_BEGINNING, op.AT_BEGINNING_STRING, op.AT_END, op.AT_END_STRING):
                continue
            elif code not in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
                raise PatternError(f"it uses {str(code).lower().replace('_', ' ')}, which is not supported here")

    def _sequence(self, tree: Iterable[Any], positions: set[int]) -> set[int]:
        for code, argument in tree:
            if not positions:
                break
            positions = self._step(code, argument, positions)
        return positions

    def _step(self, code: Any, argument: Any, positions: set[int]) -> set[int]:
        """All positions that one element of the expression can lead to from any of ``positions``."""
        self._steps += len(positions)
        if self._steps > MOST_STEPS:
            raise PatternError(f"it takes more than {MOST_STEPS} steps for the name `{self._name}`")
        name = self._name
        if code is op.AT:
            at = 0 if argument in (op.AT_BEGINNING, op.AT_BEGINNING_STRING) else len(name)
            return positions & {at}
        if code is op.SUBPATTERN:
            return self._sequence(argument[3], positions)
        if code is op.BRANCH:
            return set().union(*(self._sequence(branch, positions) for branch in argument[1]))
        if code in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, repeated = argument
            return self._repeat(least, most, repeated, positions)
        return {at + 1 for at in positions if at < len(name) and _accepts(code, argument, name[at])}

    def _repeat(self, least: int, most: int, tree: Any, positions: set[int]) -> set[int]:
        # Positions never go back, so after as many rounds as there are positions another round changes nothing.
        rounds = len(self._name) + 1
        for _ in range(min(least, rounds)):
            following = self._sequence(tree, positions)
            if following == positions:
                break
            positions = following
        reached, ahead = set(positions), positions
        for _ in range(min(most - least, rounds)):
            ahead = self._sequence(tree, ahead) - reached
            if not ahead:
                break
            reached |= ahead
        return reached


def _accepts(code: Any, argument: Any, sign: str) -> bool:
    """Whether one element of an expression takes one character."""
    if code is op.ANY:
        return sign != "\n"
    if code is op.LITERAL:
        return ord(sign) == argument
    if code is op.NOT_LITERAL:
        return ord(sign) != argument
    if code is op.RANGE:
        return bool(argument[0] <= ord(sign) <= argument[1])
    if code is op.CATEGORY:
        holds, wanted = CATEGORIES[argument]
        return bool(holds(sign)) == wanted
    negated = argument[0][0] is op.NEGATE
    return any(_accepts(kind, value, sign) for kind, value in argument[negated:]) != negated


class SuffixPatterns:
    """Patterns that PEFT matches against the end of a module's name: the first that fits decides.

    A pattern fits a name as a whole, or what follows one of the name's dots: `q_proj` fits
    `model.layers.0.self_attn.q_proj`. (PEFT lets an expression begin after any dot: `re.match(rf"(.*\\.)?({key})$")`.)
    A key that is a plain name is looked up, its dots standing for themselves.

    Args:
        texts: the patterns in their order.

    Raises:
        PatternError: for one that cannot be evaluated; the message names it.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._whole: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self._others: list[tuple[int, Pattern]] = []
        self._found: dict[str, int | None] = {}
        for index, text in enumerate(texts):
            literal = LITERAL.fullmatch(text) if len(text) <= LONGEST_PATTERN else None
            if literal:
                kind = self._whole if literal[1] else self._ends
                kind.setdefault(literal[2].replace("\\", ""), index)
            else:
                try:
                    self._others.append((index, Pattern(text)))
                except PatternError as error:
                    raise PatternError(f"{text[:100]!r}: {error}") from error

    def first(self, name: str) -> int | None:
        """Index of the first pattern that fits ``name``, or None.

        Raises:
            PatternError: when a pattern takes too many steps; the message names it.
        """
        if name not in self._found:
            starts = [0, *(at + 1 for at, sign in enumerate(name) if sign == ".")]
            fitting = [self._ends[name[at:]] for at in starts if name[at:] in self._ends]
            fitting += [self._whole[name]] if name in self._whole else []
            best = min(fitting, default=None)
            for index, pattern in self._others:
                if best is not None and index > best:
                    break
                try:
                    if pattern.matches(name, starts):
                        best = index
                        break
                except PatternError as error:
                    raise PatternError(f"{pattern.text[:100]!r}: {error}") from error
            self._found[name] = best
        return self._found[name]
