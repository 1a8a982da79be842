"""How an ensemble's budget divides: forecasts beside what is computed directly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.adapter.ensemble.division import PARTS, Sample, _left, divide
from gptqmodel_eora_ext.adapter.ensemble.folder import SHARED
from gptqmodel_eora_ext.formats.sizes import ModuleShape, factor_bytes
from gptqmodel_eora_ext.solve import eora, weighted_energy

NAMES = ("math", "code")


def sample(seed: int, out_features: int = 24, in_features: int = 32, *, apart: float = 1.0) -> Sample:
    """A module whose texts have inputs of their own in part: ``apart`` 0 gives all one moment."""
    generator = torch.Generator().manual_seed(seed)

    def moment() -> torch.Tensor:
        inputs = torch.randn(200, in_features, generator=generator) * torch.rand(in_features, generator=generator)
        return inputs.T @ inputs / len(inputs)

    common = moment()
    moments = {name: (1 - apart) * common + apart * moment() for name in (SHARED, *NAMES)}
    return Sample(torch.randn(out_features, in_features, generator=generator), moments)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), shared=st.integers(1, 20), own=st.integers(0, 24))
def test_what_is_forecast_is_what_members_leave(seed: int, shared: int, own: int) -> None:
    """The curve at r is the error that the shared adapter and a member of rank r really leave."""
    module = sample(seed)
    curves = _left(module, shared, NAMES)
    everywhere = sum(module.moments.values()) / len(module.moments)
    lora_A, lora_B = eora(module.delta, everywhere, shared)
    rest = module.delta - lora_B @ lora_A
    for name in NAMES:
        moment, left = module.moments[name], rest
        if own:
            lora_A, lora_B = eora(rest, moment, own)
            left = rest - lora_B @ lora_A
        expected = float(weighted_energy(left, moment) / weighted_energy(module.delta, moment))
        assert float(curves[name][own]) == pytest.approx(expected, abs=1e-4)
        assert bool((curves[name].diff() <= 1e-6).all()) and float(curves[name][0]) <= 1 + 1e-5


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), budget=st.integers(2000, 60000), apart=st.floats(0, 1))
def test_the_budget_is_kept(seed: int, budget: int, apart: float) -> None:
    found = divide([sample(seed, apart=apart)], budget, 24 * 32, NAMES, factor_bits=16)
    assert budget - 3 <= found.total <= budget
    assert min(found.members.values()) > 0 and set(found.forecast) == set(PARTS)
    assert found.shared in {int(budget * part) for part in PARTS}


def test_the_part_is_chosen_by_what_its_bytes_buy() -> None:
    """So many components in 16 bits are forecast alike for as many bytes of those in 4 as those components take."""
    modules = [sample(seed, 256, 256) for seed in range(2)]
    shape, weights = ModuleShape("", 256, 256), 2 * 256 * 256
    wide, narrow = (
        divide(modules, 2 * factor_bytes(64, shape, bits), weights, NAMES, factor_bits=bits) for bits in (16, 4)
    )
    assert wide.forecast == pytest.approx(narrow.forecast, abs=2e-4)
    assert divide(modules, 2 * factor_bytes(64, shape, 4), weights, NAMES, factor_bits=16).forecast != wide.forecast


def test_members_in_fewer_modules_have_more_components_in_each() -> None:
    modules = [sample(seed) for seed in range(2)]
    budget, weights = 2 * 6 * 2 * (24 + 32), 2 * 24 * 32
    everywhere, half = (
        divide(modules, budget, weights, NAMES, factor_bits=16, member_weights=count) for count in (None, weights // 2)
    )
    assert all(half.forecast[part] < everywhere.forecast[part] for part in PARTS)


def test_a_domain_that_is_served_already_gets_less() -> None:
    """The shared text is math's own, so that the code's member has more to correct."""
    modules = []
    for seed in range(2):
        made = sample(seed)
        modules.append(Sample(made.delta, {**made.moments, "math": made.moments[SHARED]}))
    found = divide(modules, 2 * 10 * 2 * (24 + 32), 2 * 24 * 32, NAMES, factor_bits=16)
    assert found.members["code"] > found.members["math"]


def test_where_nothing_is_left_members_get_alike() -> None:
    found = divide([sample(0)], 60_000, 24 * 32, NAMES, factor_bits=16)
    assert found.members["code"] == found.members["math"]
