"""Second moments: exact sums, independent of batching, order, padding and device."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.capture import SecondMoment, shared_leaders


def exact(rows: torch.Tensor) -> torch.Tensor:
    wide = rows.to(torch.float64).reshape(-1, rows.shape[-1])
    return wide.T @ wide / wide.shape[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (1, 2, 3, 5)])
def test_equals_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rows = torch.randn(shape).to(dtype)
    moment = SecondMoment(5, "layer")
    moment.add(rows)
    torch.testing.assert_close(moment.mean().double(), exact(rows), rtol=1e-5, atol=1e-6)
    assert moment.tokens == rows.numel() // 5


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=5), seed=st.integers(0, 99))
def test_batching_and_order_do_not_matter(cuts: list[int], seed: int) -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
    edges = [0, *sorted(set(cuts)), 40]
    batches = [rows[a:b] for a, b in pairwise(edges)]
    forward, backward = SecondMoment(6, "x"), SecondMoment(6, "x")
    for batch in batches:
        forward.add(batch)
    for batch in reversed(batches):
        backward.add(batch)
    torch.testing.assert_close(forward.mean(), backward.mean())
    torch.testing.assert_close(forward.mean().double(), exact(rows), rtol=1e-5, atol=1e-5)


def test_padding_is_left_out() -> None:
    rows = torch.randn(3, 4, 5)
    keep = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    padded, plain = SecondMoment(5, "x"), SecondMoment(5, "x")
    padded.add(rows, keep)
    plain.add(rows[keep.bool()])
    torch.testing.assert_close(padded.mean(), plain.mean())
    assert padded.tokens == 6


def test_sums_of_several_devices_are_merged() -> None:
    """One CPU under two names stands for two devices."""
    rows = torch.randn(9, 4)
    parts, whole = SecondMoment(4, "x"), SecondMoment(4, "x")
    parts.add(rows[:2])
    parts._sums[torch.device("cpu:0")] = rows[2:].T @ rows[2:]
    parts.tokens += 7
    whole.add(rows)
    torch.testing.assert_close(parts.mean(), whole.mean())


def test_finished_sums_are_added() -> None:
    rows = torch.randn(9, 4)
    parts, whole = SecondMoment(4, "x"), SecondMoment(4, "x")
    parts.add_sum(rows[:4].T @ rows[:4], 4)
    parts.add_sum(rows[4:].T @ rows[4:], 5)
    whole.add(rows)
    torch.testing.assert_close(parts.mean(), whole.mean())
    assert parts.tokens == 9


def test_rescaled_is_the_moment_of_divided_inputs() -> None:
    rows, scales = torch.randn(20, 4), torch.rand(4) + 0.5
    moment, divided = SecondMoment(4, "x"), SecondMoment(4, "x")
    moment.add(rows)
    divided.add(rows / scales)
    torch.testing.assert_close(moment.rescaled(scales, "y").mean(), divided.mean())


def test_no_token_gives_zeros() -> None:
    moment = SecondMoment(3, "expert")
    moment.add(torch.empty(0, 3))
    assert moment.tokens == 0 and not moment.mean().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_inputs_name_the_module(bad: float) -> None:
    moment = SecondMoment(3, "model.layers.4.mlp.down_proj")
    rows = torch.randn(5, 3)
    rows[2, 1] = bad
    moment.add(rows)
    with pytest.raises(ValueError, match=r"model\.layers\.4\.mlp\.down_proj: .*NaN or infinity"):
        moment.require_finite()


def test_wrong_shapes_are_named() -> None:
    moment = SecondMoment(3, "q_proj")
    with pytest.raises(ValueError, match="q_proj: input has 4 channels, expected 3"):
        moment.add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"attention mask \(2, 2\) does not fit input \(2, 5, 3\)"):
        moment.add(torch.zeros(2, 5, 3), torch.ones(2, 2))


def test_shared_leaders() -> None:
    widths = {"q": 8, "k": 8, "v": 4, "o": 8}
    assert shared_leaders(["q", "k", "v", "o"], [["q", "k", "v"], ["missing"]], widths) == {"k": "q"}
