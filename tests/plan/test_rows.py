"""Rows of inputs and gradients: let go of as soon as nobody holds them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from gptqmodel_eora_ext.plan.rows import InputRows, OutputGradients

TOKENS, FEATURES = 6, 4


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    """A sweep may end before garbage is ever collected, so that a circle of references holds every layer's rows."""
    gc.disable()
    yield
    gc.enable()


def test_inputs_are_freed_without_collecting_garbage() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(FEATURES, FEATURES))
    with InputRows("layer", layer, {"layer.0": layer[0]}) as watch:  # type: ignore[dict-item]
        watch.begin(torch.ones(1, TOKENS, dtype=torch.bool))
        layer(torch.randn(1, TOKENS, FEATURES))
    assert watch.rows("layer.0").shape == (TOKENS, FEATURES)
    held = weakref.ref(watch)
    del watch
    assert held() is None


def test_gradients_are_freed_without_collecting_garbage() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(FEATURES, FEATURES))
    with OutputGradients("layer", layer, {"layer.0": layer[0]}) as watch:  # type: ignore[dict-item]
        watch.keep = torch.ones(1, TOKENS, dtype=torch.bool)
        layer(torch.randn(1, TOKENS, FEATURES)).sum().backward()
    assert torch.cat(watch.gradients["layer.0"]).shape == (TOKENS, FEATURES)
    held = weakref.ref(watch)
    del watch
    assert held() is None
