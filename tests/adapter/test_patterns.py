"""Patterns over module names: PEFT's answers, in a bounded number of steps."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from gptqmodel_eora_ext.adapter.patterns import LONGEST_PATTERN, Pattern, PatternError, SuffixPatterns

NAME = "model.layers.10.self_attn.q_proj"

elements = st.sampled_from(["a", "b", r"\.", "[ab]", "[^a]", "[a-c1]", ".", r"\w", r"\d", r"[\W]", "^", "$", "", "a.b"])
expressions = st.recursive(
    elements,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda both: f"({both[0]}|{both[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "*?", "{0,3}", "{2,}"])).map(
            lambda both: f"(?:{both[0]}){both[1]}"
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=1000, deadline=None)
@given(st.lists(expressions, min_size=1, max_size=3), st.text("ab.1", max_size=7))
def test_the_first_that_fits_is_pefts(patterns: list[str], name: str) -> None:
    expected = get_pattern_key(patterns, name)
    # PEFT gives the name itself where none fits.
    fitting = [index for index, one in enumerate(patterns) if re.match(rf"(.*\.)?({one})$", name)]
    found = SuffixPatterns(patterns).first(name)
    # In a plain name a dot stands for itself here, and for any character in PEFT.
    if not any(re.search(r"\w\.\w", one) for one in patterns):
        assert found == (fitting[0] if fitting else None)
        assert found is None or patterns[found] == expected


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("q_proj", True),
        ("proj", False),
        ("self_attn.q_proj", True),
        (r"^model\.layers\.10\.self_attn\.q_proj$", True),
        ("^self_attn.q_proj", False),
        (r"layers\.(1|10)\..*q_proj", True),
        (r".*\.[qk]_proj", True),
        ("(([a-z_.0-9]+)+)+!", False),
        ("(([a-z_.0-9]+)+)+", True),
        ("((((((a|a)*)*)*)*)*)*b", False),
        (".*.*.*.*.*.*.*.*.*.*x", False),
        ("(x?){4000000000}q_proj", True),
    ],
)
def test_known_answers_come_at_once(pattern: str, fits: bool) -> None:
    assert (SuffixPatterns([pattern]).first(NAME) is not None) is fits


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(q_proj", "no regular expression"),
        ("*", "no regular expression"),
        ("a{99999999999}", "no regular expression"),
        ("a" * (LONGEST_PATTERN + 1), "has 1001 characters, at most 1000"),
        ("(" * 60 + "a" + ")" * 60, "more than 50 deep"),
        ("(" * 499 + "a" + ")" * 499, "more than 50 deep|no regular expression"),
        (r"(a)\1", "uses groupref"),
        ("(?=a)b", "uses assert"),
        (r"\bq", "uses at"),
        ("(?i)q_proj.*", "sets flags"),
        ("(?i:q).*", "sets flags"),
    ],
)
def test_what_cannot_be_evaluated_is_told(pattern: str, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        SuffixPatterns([pattern])


def test_steps_are_bounded() -> None:
    with pytest.raises(PatternError, match="more than 100000 steps for the name"):
        Pattern("(?:" + "|".join(["[a-z]*"] * 140) + ")*b").matches("a" * 5000)


def test_thousands_of_names_are_looked_up() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(40) for expert in range(100)]
    patterns = SuffixPatterns([name.replace(".", r"\.") for name in names])
    assert [patterns.first(name) for name in names] == list(range(len(names)))
