"""Padding among the tokens that are routed to experts is found, whatever order a layer gathers them in."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.capture import RoutedRows
from gptqmodel_eora_ext.capture.routed import checksums

FEATURES, INNER, EXPERTS = 6, 4, 3


class Expert(torch.nn.Module):
    """Two modules, the second of which reads what the first gives."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = torch.nn.Linear(FEATURES, INNER)
        self.down_proj = torch.nn.Linear(INNER, FEATURES)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(rows).relu())


class Block(torch.nn.Module):
    """Experts that read the tokens listed for them, and one that reads all, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.shared_expert = Expert()
        self.gate_proj = torch.nn.Linear(FEATURES, FEATURES)
        self.order: list[torch.Tensor] = []
        self.scale = 1.0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.gate_proj(hidden)
        flat = hidden.reshape(-1, FEATURES)
        self.shared_expert(flat)
        for expert, places in zip(self.experts, self.order, strict=True):
            if len(places):
                expert(flat[places] * self.scale)
        return hidden


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Block()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden + 1)


def masks(layer: Layer, hidden: torch.Tensor, keep: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """What `RoutedRows` says of every linear module's input."""
    found: dict[str, torch.Tensor | None] = {}
    handles = []
    with RoutedRows(layer, lambda: keep) as routed:
        for path, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):

                def look(_: torch.nn.Module, args: tuple[torch.Tensor, ...], path: str = path) -> None:
                    found[path] = routed.real(path, args[0])

                handles.append(module.register_forward_pre_hook(look))
        layer(hidden)
    for handle in handles:
        handle.remove()
    return found


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_module_is_told_its_padding(data: st.DataObject) -> None:
    windows, tokens = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 6)))
    count = windows * tokens
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count))).reshape(windows, tokens)
    layer = Layer()
    # An expert sees a token once, in any order; also all tokens, or none.
    layer.mlp.order = [torch.tensor(data.draw(st.lists(st.integers(0, count - 1), unique=True)), dtype=torch.long)
                       for _ in range(EXPERTS)]  # fmt: skip
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    layer.to(dtype)
    found = masks(layer, torch.randn(windows, tokens, FEATURES).to(dtype), keep.long())
    if keep.all():
        assert not any(torch.is_tensor(one) for one in found.values())
        return
    assert torch.equal(found["mlp.gate_proj"], keep)
    for name in ("up_proj", "down_proj"):
        assert torch.equal(found[f"mlp.shared_expert.{name}"], keep.reshape(-1))
        for number, places in enumerate(layer.mlp.order):
            if len(places):
                assert torch.equal(found[f"mlp.experts.{number}.{name}"], keep.reshape(-1)[places])


def test_nothing_is_left_out_where_all_tokens_count() -> None:
    layer = Layer()
    layer.mlp.order = [torch.tensor([0, 2]), torch.tensor([1]), torch.tensor([3])]
    found = masks(layer, torch.randn(2, 2, FEATURES), None)
    assert set(found.values()) == {None}


def test_a_batch_does_not_remember_the_one_before() -> None:
    layer = Layer()
    hidden = torch.randn(2, 3, FEATURES)
    layer.mlp.order = [torch.tensor([0, 4]), torch.tensor([5, 1, 2]), torch.tensor([3])]
    with RoutedRows(layer, lambda: keep) as routed:
        for keep in (torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.ones(2, 3)):
            layer(hidden)
            places = layer.mlp.order[1]
            real = routed.real("mlp.experts.1.up_proj", hidden.reshape(-1, FEATURES)[places])
            expected = None if keep.all() else keep.reshape(-1).bool()[places]
            assert real is None if expected is None else torch.equal(real, expected)


def test_rows_that_are_not_those_of_the_block_all_count_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    layer = Layer()
    layer.mlp.scale = 0.5
    layer.mlp.order = [torch.tensor([0, 1]), torch.tensor([2, 0]), torch.tensor([1])]
    found = masks(layer, torch.randn(1, 3, FEATURES), torch.tensor([[1, 1, 0]]))
    assert all(found[f"mlp.experts.{number}.up_proj"] is None for number in range(EXPERTS))
    assert len([one for one in caplog.records if "cannot be told apart from padding" in one.message]) == 1
    # Where every expert reads every token, weighted, they are in order.
    layer.mlp.order = [torch.arange(3)] * EXPERTS
    found = masks(layer, torch.randn(1, 3, FEATURES), torch.tensor([[1, 1, 0]]))
    assert torch.equal(found["mlp.experts.2.down_proj"], torch.tensor([True, True, False]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_checksum_is_of_the_row_alone(dtype: torch.dtype) -> None:
    rows = torch.randn(2500, 7).to(dtype)
    sums = checksums(rows)
    assert torch.equal(sums[[3, 2000, 5]], checksums(rows[[3, 2000, 5]]))
    assert len(set(sums.tolist())) == len({tuple(row) for row in rows.tolist()})
