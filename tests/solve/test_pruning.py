"""Pruning: patterns hold exactly, as many weights go as were asked, and SparseGPT makes up for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.formats.sparsity import Pattern, examine
from gptqmodel_eora_ext.solve import (
    METHODS,
    Grid,
    column_order,
    gptq,
    prune,
    sparsegpt,
    sparsegpt_codes,
    weighted_energy,
)

PATTERNS = ("2:4", "4:8", "1:4", "0.5", "70%")


def problem(seed: int, out_features: int, in_features: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W, and C of inputs whose channels differ in size and go together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    sizes = torch.exp(torch.randn(in_features, generator=generator))
    rows = torch.randn(tokens, in_features, generator=generator) @ (torch.eye(in_features) + mixing) * sizes
    return torch.randn(out_features, in_features, generator=generator), rows.T @ rows / tokens


def error(weight: torch.Tensor, pruned: torch.Tensor, second_moment: torch.Tensor) -> float:
    return weighted_energy(weight - pruned, second_moment)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", PATTERNS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), blocks=st.integers(1, 40), out_features=st.integers(1, 40))
def test_patterns_hold_exactly(method: str, text: str, seed: int, blocks: int, out_features: int) -> None:
    pattern = Pattern.parse(text)
    weight, second_moment = problem(seed, out_features, 8 * blocks, 200)
    pruned = prune(weight, second_moment, pattern, method)
    zero = pruned == 0
    if pattern.of:
        groups = zero.view(out_features, -1, pattern.of).sum(2)
        assert bool((groups == pattern.of - pattern.kept).all())
    else:
        # Blocks of columns and rows are rounded one by one.
        most = out_features if method == "wanda" else -(-8 * blocks // 128)
        assert abs(int(zero.sum()) - pattern.share * weight.numel()) <= most
    if method != "sparsegpt":
        assert torch.equal(pruned[~zero], weight[~zero])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    blocks=st.integers(2, 30),
    text=st.sampled_from(PATTERNS),
    tokens=st.sampled_from((64, 999)),
)
def test_sparsegpt_leaves_less_error_than_magnitude(seed: int, blocks: int, text: str, tokens: int) -> None:
    pattern = Pattern.parse(text)
    weight, second_moment = problem(seed, 32, 8 * blocks, tokens)
    found = {method: error(weight, prune(weight, second_moment, pattern, method), second_moment) for method in METHODS}
    assert found["sparsegpt"] <= found["magnitude"]


def test_weights_that_stay_make_up_for_those_that_go() -> None:
    """With the mask that SparseGPT chose, the weights it changed leave less error than those it was given."""
    weight, second_moment = problem(0, 64, 256, 2000)
    pruned = sparsegpt(weight, second_moment, Pattern.parse("2:4"))
    masked = weight * (pruned != 0)
    assert error(weight, pruned, second_moment) < 0.8 * error(weight, masked, second_moment)


def test_one_column_at_a_time_is_the_best_that_is_left() -> None:
    """Two columns, of which the first goes: the second becomes what least squares makes it."""
    second_moment = torch.tensor([[1.0, 0.6], [0.6, 2.0]])
    weight = torch.tensor([[0.1, 5.0]])
    pruned = sparsegpt(weight, second_moment, Pattern(1, 2, 0.5), damping=0.0)
    assert torch.allclose(pruned, torch.tensor([[0.0, 5.0 + 0.1 * 0.6 / 2.0]]))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 256])
@pytest.mark.parametrize("text", ["2:4", "0.5"])
def test_pruned_and_rounded_at_once(text: str, group_size: int, sym: bool) -> None:
    """Codes are integers of the grid, zeros are exact, and it is better than rounding what was pruned."""
    pattern, grid, bits = Pattern.parse(text), Grid(group_size, sym), 4
    weight, second_moment = problem(2, 32, 320, 2000)
    found = sparsegpt_codes(weight, second_moment, pattern, bits, grid)
    size = 320 if group_size == -1 else group_size
    scales, zeros = (one.repeat_interleave(size, dim=1)[:, :320] for one in (found.scales, found.zeros))
    codes = found.weight / scales + zeros
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert codes.min() > -0.1 and codes.max() < 2**bits - 0.9
    assert torch.equal(zeros, zeros.round())
    assert int((found.weight == 0).sum()) >= weight.numel() // 2
    if pattern.of:
        assert int((found.weight == 0).view(32, -1, 4).sum(2).min()) >= 2
    pruned = sparsegpt(weight, second_moment, pattern)
    one_after_the_other = gptq(pruned, column_order(second_moment, group_size), [bits], grid)[0] * (pruned != 0)
    assert error(weight, found.weight, second_moment) < error(weight, one_after_the_other, second_moment)


def test_inputs_that_are_always_zero_keep_no_weight() -> None:
    weight, second_moment = problem(1, 16, 32, 500)
    second_moment[:, 3] = second_moment[3] = 0
    pruned = sparsegpt(weight, second_moment, Pattern.parse("2:4"))
    assert not pruned[:, 3].any() and bool(torch.isfinite(pruned).all())


def test_wanda_weighs_by_the_size_of_inputs() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    energies = torch.tensor([100.0, 1.0, 1.0, 100.0])
    assert prune(weight, energies, Pattern.parse("2:4"), "wanda").tolist() == [[1.0, 0.0, 0.0, 4.0]]
    assert prune(weight, energies, Pattern.parse("2:4"), "magnitude").tolist() == [[0.0, 0.0, 3.0, 4.0]]


def test_what_does_not_fit_is_named() -> None:
    weight, second_moment = problem(0, 4, 18, 50)
    with pytest.raises(ValueError, match=r"weight: 18 inputs cannot be cut into groups of 4.*\(50%\)"):
        prune(weight, second_moment, Pattern.parse("2:4"), "magnitude")
    with pytest.raises(ValueError, match="method must be one of sparsegpt, wanda, magnitude, got 'obs'"):
        prune(weight, second_moment, Pattern.parse("0.5"), "obs")
    with pytest.raises(ValueError, match="groups divide 32, got 2:6"):
        sparsegpt(weight, second_moment, Pattern.parse("2:6"))


@pytest.mark.parametrize("text", ["2", "4:2", "0:4", "2:4:8", "120%", "", "-0.5", "half", "0", "1.0"])
def test_a_pattern_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match='pattern must be "2:4"'):
        Pattern.parse(text)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), text=st.sampled_from(("2:4", "4:8", "0.5")))
def test_what_was_pruned_is_found(seed: int, text: str) -> None:
    weight, second_moment = problem(seed, 16, 64, 100)
    pruned = prune(weight, second_moment, Pattern.parse(text), "magnitude").to(torch.bfloat16)
    found = examine(pruned)
    assert found.is_pruned and found.share == 0.5
    assert found.pattern == (text if ":" in text else None)
    # 2 bits for the place of each of 2 values of 16 bits; 3 for each of 4; a bit for every weight.
    assert found.nbytes(16) == {"2:4": 1024 * 9 // 8, "4:8": 1024 * 19 // 16, "0.5": 1024 * 9 // 8}[text]
    broken = pruned.clone()
    broken[0][broken[0] == 0] = 1
    assert examine(broken).pattern is None and not examine(weight).is_pruned
