"""Forecasts scaled by what another quantiser leaves: by kind and width, from a few layers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptqmodel_eora_ext.plan.forecast import Forecast
from gptqmodel_eora_ext.plan.scaling import compared_layers, left_of_forecast, scaled
from gptqmodel_eora_ext.plan.sweep import Swept

WIDTHS = (2, 4)


def forecasts(layers: int, kinds: tuple[str, ...], scale: float = 1.0) -> dict[str, dict[int, Forecast]]:
    return {
        f"layers.{layer}.{kind}": {
            bits: Forecast(scale * (layer + 1) / bits, scale * torch.tensor([0.2, 0.1]) / bits) for bits in WIDTHS
        }
        for layer in range(layers)
        for kind in kinds
    }


@given(st.integers(1, 200), st.integers(2, 6))
def test_compared_layers_are_spread_evenly(count: int, compared: int) -> None:
    names = [f"layers.{index}" for index in range(count)]
    chosen = compared_layers(names, compared)
    assert chosen[0] == names[0] and chosen[-1] == names[-1]
    places = [names.index(one) for one in chosen]
    assert len(set(places)) == min(count, compared)
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_kind_is_scaled_by_the_geometric_mean_of_its_modules() -> None:
    known = forecasts(3, ("q_proj", "down_proj"))
    found = {
        name: {bits: one.scaled({0: 0.5, 2: 2.0}[int(name.split(".")[1])] * (3.0 if "down" in name else 1.0) * bits)
               for bits, one in widths.items()}
        for name, widths in known.items()
        if ".1." not in name
    }  # fmt: skip
    factors = left_of_forecast(known, found)
    for (kind, bits), factor in factors.items():
        assert factor == pytest.approx((3.0 if kind == "down_proj" else 1.0) * bits)
    after = scaled(Swept(known, {}, {}), factors)
    assert after.forecasts.keys() == known.keys()
    for name, widths in after.forecasts.items():
        for bits, one in widths.items():
            factor = factors[name.rsplit(".", 1)[-1], bits]
            assert one.total == pytest.approx(known[name][bits].total * factor)
            assert torch.allclose(one.gains, known[name][bits].gains * factor)


def test_a_kind_that_was_not_compared_gets_the_mean_of_its_width() -> None:
    known = forecasts(2, ("q_proj", "k_proj", "router"))
    factors = {("q_proj", 2): 0.5, ("k_proj", 2): 2.0, ("q_proj", 4): 4.0, ("k_proj", 4): 9.0}
    after = scaled(Swept(known, {}, {}), factors).forecasts["layers.0.router"]
    for bits, mean in ((2, 1.0), (4, math.sqrt(36.0))):
        assert after[bits].total == pytest.approx(mean * known["layers.0.router"][bits].total)
