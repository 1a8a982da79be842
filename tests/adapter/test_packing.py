"""Finished adapters in fewer bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.adapter.errors import AdapterError
from gptqmodel_eora_ext.adapter.factors import ModuleFactors
from gptqmodel_eora_ext.adapter.folder import AdapterFolder
from gptqmodel_eora_ext.adapter.packing import _orthogonal, export_packed
from gptqmodel_eora_ext.adapter.save import save_adapter

# Module → out, in, rank.
SHAPES = {"layers.0.q_proj": (96, 64, 8), "layers.0.k_proj": (48, 64, 4), "layers.1.q_proj": (96, 64, 8)}


def made(folder: Path, *, scale: float = 1.0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A plain adapter of random factors; its modules' A and B."""
    generator = torch.Generator().manual_seed(0)
    factors, pairs = {}, {}
    for name, (out_features, in_features, rank) in SHAPES.items():
        lora_A = torch.randn(rank, in_features, generator=generator) * scale
        lora_B = torch.randn(out_features, rank, generator=generator)
        pairs[name] = lora_A, lora_B
        factors[name] = ModuleFactors(lora_A, lora_B, rank, 1, 1.0, 1.0, None)
    save_adapter(folder, factors, base_model="out", module_names=list(SHAPES), details={"objective": "eora"})
    return pairs


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.2)])
def test_the_product_stays_but_for_what_is_told(tmp_path: Path, bits: int, most: float) -> None:
    pairs = made(tmp_path / "plain")
    told = export_packed(AdapterFolder.open(tmp_path / "plain"), tmp_path / "packed", bits)
    folder = AdapterFolder.open(tmp_path / "packed")
    assert folder.is_packed and folder.factor_bits == bits and set(told) == set(pairs)
    for name, read in folder.factors(list(folder.keys)):
        lora_A, lora_B = pairs[name]
        product = lora_B @ lora_A
        found = float((read.lora_B @ read.lora_A - product).norm() / product.norm())
        assert found == pytest.approx(told[name], rel=1e-3) and 0 < found < most


def test_scales_of_components_do_not_matter(tmp_path: Path) -> None:
    """Adam leaves A and B of any sizes; in 4 bits of their own basis a component 1,000 times larger loses nothing."""
    for name, scale in (("even", 1.0), ("uneven", 1e3)):
        made(tmp_path / name, scale=scale)
    even, uneven = (
        export_packed(AdapterFolder.open(tmp_path / name), tmp_path / f"{name}-4", 4) for name in ("even", "uneven")
    )
    assert uneven == pytest.approx(even, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(12, 40), st.integers(12, 40), st.integers(0, 1000))
def test_components_are_orthogonal_and_reach_the_same(rank: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lora_A, lora_B = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    found = _orthogonal(lora_A, lora_B)
    gram = found @ found.T
    assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-4 * float(gram.max()))
    product = lora_B @ lora_A
    best = torch.linalg.lstsq(found.T, product.T).solution.T @ found
    assert torch.allclose(best, product, atol=1e-4 * float(product.abs().max()))


def test_a_module_without_effect(tmp_path: Path) -> None:
    zero = ModuleFactors(torch.zeros(2, 16), torch.zeros(16, 2), 2, 1, 1.0, 1.0, None)
    save_adapter(tmp_path / "plain", {"a.q_proj": zero}, base_model="out", module_names=["a.q_proj"], details={})
    assert export_packed(AdapterFolder.open(tmp_path / "plain"), tmp_path / "packed", 4) == {"a.q_proj": 0.0}


def test_what_is_refused(tmp_path: Path) -> None:
    made(tmp_path / "plain")
    plain = AdapterFolder.open(tmp_path / "plain")
    with pytest.raises(AdapterError, match="is the adapter itself"):
        export_packed(plain, tmp_path / "plain", 4)
    with pytest.raises(ValueError, match="factor_bits must be one of 8, 4, got 3"):
        export_packed(plain, tmp_path / "packed", 3)
    export_packed(plain, tmp_path / "packed", 4)
    with pytest.raises(AdapterError, match="has factors in 4 bits already"):
        export_packed(AdapterFolder.open(tmp_path / "packed"), tmp_path / "again", 8)
