"""Agreement and divergence beside a full-precision model, and windows that slide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.evaluate.divergence import Reference, summed_divergence
from gptqmodel_eora_ext.evaluate.perplexity import Windows
from gptqmodel_eora_ext.system.spill import Spill


@given(size=st.integers(2, 40), stride=st.integers(1, 40), tokens=st.integers(2, 300))
@settings(max_examples=200, deadline=None)
def test_every_token_is_predicted_once(size: int, stride: int, tokens: int) -> None:
    """All but the very first (where windows overlap) or the first of each window, up to the last whole window."""
    if stride > size:
        with pytest.raises(ValueError, match=f"the stride is {stride}, expected 1 to {size}"):
            Windows(size, stride)
        return
    windows = Windows(size, stride)
    if tokens < size:
        with pytest.raises(ValueError, match=f"The text has {tokens} tokens; one window of {size}"):
            windows.starts(tokens)
        return
    starts = windows.starts(tokens)
    predicted = [start + place for start in starts for place in range(windows.first_predicted(start), size)]
    end = starts[-1] + size
    assert tokens - end < stride and end <= tokens
    expected = [place for place in range(1, end) if stride < size or place % size]
    assert predicted == expected
    for most in (1, 3):
        limited = Windows(size, stride, most)
        assert list(limited.starts(tokens)) == list(starts[:most])
        assert limited.tokens == size + (most - 1) * stride


def test_windows_say_how_a_text_is_cut() -> None:
    assert Windows(512).title == "non-overlapping windows of 512 tokens"
    assert Windows(512, 128).title == "sliding windows of 512 tokens, each predicting its last 128"
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        Windows(1)


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 300), vocabulary=st.integers(2, 50))
@settings(max_examples=50, deadline=None)
def test_divergence_is_the_definition(seed: int, rows: int, vocabulary: int) -> None:
    torch.manual_seed(seed)
    full, other = 3 * torch.randn(2, rows, vocabulary)
    p, q = (torch.softmax(one.double(), -1) for one in (full, other))
    expected = float((p * (p.log() - q.log())).sum())
    found = summed_divergence(full, other)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert summed_divergence(full, full) == pytest.approx(0, abs=1e-6)
    assert found > -1e-6


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_what_is_kept_is_what_is_compared_with(limit: int, tmp_path: Path) -> None:
    """From memory and from disk alike; beyond the windows that logits are kept of, only the likeliest token is."""
    torch.manual_seed(0)
    full = torch.randn(3, 7, 11).to(torch.bfloat16)
    other = full.clone()
    other[1, 2] = -other[1, 2]  # one token of the second window is told otherwise
    spill = Spill(limit, tmp_path)
    reference = Reference(spill, most=2)
    for logits in full:
        reference.keep(logits)
    found = [reference.compare(window, logits) for window, logits in enumerate(other)]
    assert [one["same"] for one in found] == [7, 6, 7]
    assert found[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert found[1]["kl"] == pytest.approx(summed_divergence(full[1, 2:3], other[1, 2:3]), rel=1e-5)
    assert found[2]["kl"] is None
    with pytest.raises(ValueError, match="11 tokens apart, this one 9"):
        reference.compare(0, torch.randn(7, 9))
    spill.close()
