"""Differences and their noise, and the sentences that tell them."""

from __future__ import annotations

import numpy
import pytest

from gptqmodel_eora_ext.evaluate.bootstrap import LEAST_ITEMS, paired_difference
from gptqmodel_eora_ext.evaluate.outcome import Comparison


def test_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    """For many items: ± 1.96 standard errors of the paired differences."""
    draws = numpy.random.default_rng(1)
    first, second = draws.normal(1.0, 2.0, (2, 800))
    second += 0.4
    found = paired_difference(first.tolist(), second.tolist())
    gaps = first - second
    assert found.value == pytest.approx(gaps.mean())
    expected = 1.96 * gaps.std() / len(gaps) ** 0.5
    assert found.half_width == pytest.approx(expected, rel=0.05)
    assert found.low is not None and found.high is not None and found.low < found.value < found.high


def test_pairs_tell_more_than_two_separate_means() -> None:
    """The same items: what both find hard does not count as noise."""
    draws = numpy.random.default_rng(2)
    hardness = draws.normal(0, 10, 200)
    first, second = hardness + draws.normal(0.5, 0.5, 200), hardness + draws.normal(0, 0.5, 200)
    found = paired_difference(first.tolist(), second.tolist())
    assert not found.is_noise and found.half_width is not None and found.half_width < 0.2


def test_how_often_noise_is_taken_for_a_difference() -> None:
    """5 % by its definition; of 200 pairs of equal models, at most twice that."""
    draws = numpy.random.default_rng(3)
    wrong = 0
    for _ in range(200):
        first, second = draws.integers(0, 2, (2, 60)).astype(float)
        wrong += not paired_difference(first.tolist(), second.tolist()).is_noise
    assert wrong <= 20


def test_weights_are_tokens() -> None:
    """Windows of different sizes: the sum of losses over the sum of tokens, as a perplexity takes them."""
    first, second, tokens = [10.0, 90.0] * 8, [20.0, 60.0] * 8, [10.0, 30.0] * 8
    found = paired_difference(first, second, tokens)
    assert found.value == pytest.approx((100 - 80) / 40)


def test_few_or_no_items() -> None:
    few = paired_difference([1.0] * (LEAST_ITEMS - 1), [0.0] * (LEAST_ITEMS - 1))
    assert few.value == 1 and few.half_width is None and few.is_noise
    for first, second in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="needs the same items of both"):
            paired_difference(first, second)


def test_sentences() -> None:
    ones, zeros = [100.0] * 30 + [0.0] * 30, [0.0] * 60
    better = Comparison("gsm8k", "out + eora", "out", paired_difference(ones, zeros), is_text=False)
    assert better.sentence.startswith("gsm8k: out + eora is better than out by 50.0 ± ")
    assert better.sentence.endswith(" points, n = 60")
    worse = Comparison("gsm8k", "a", "b", paired_difference(zeros, ones), is_text=False)
    assert "gsm8k: a is worse than b by 50.0" in worse.sentence
    lower = Comparison("novel", "a", "b", paired_difference(zeros, ones), is_text=True)
    assert "a is better than b by 50.000" in lower.sentence and "nats a token, n = 60 windows" in lower.sentence
    same = Comparison("gsm8k", "a", "b", paired_difference(ones, ones[::-1]), is_text=False)
    assert "a and b differ within noise: 0.0 ± " in same.sentence
    few = Comparison("gsm8k", "a", "b", paired_difference([1.0] * 3, [0.0] * 3), is_text=False)
    assert "too few to tell from noise" in few.sentence
