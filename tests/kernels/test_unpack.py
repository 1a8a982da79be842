"""A repacked weight gives its packed tensors back, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.formats.packed_weights import PackedWeight
from gptqmodel_eora_ext.kernels.cpu.build import library
from gptqmodel_eora_ext.kernels.cpu.repack import repack_weight, unpack_weight
from tests.kernels.cases import packed_weight

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")
TENSORS = ("qweight", "qzeros", "scales", "g_idx")


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def given_back(weight: PackedWeight) -> bool:
    repacked = repack_weight(weight)
    assert repacked.rest.complete
    found = unpack_weight(repacked)
    return set(found) == {name for name in TENSORS if getattr(weight, name) is not None} and all(
        tensor.dtype == getattr(weight, name).dtype
        and torch.equal(as_bytes(tensor), as_bytes(getattr(weight, name)))
        and tensor.is_contiguous()
        for name, tensor in found.items()
    )


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 200),
    group_size=st.sampled_from([-1, 16, 24, 32, 40, 128]),
    sym=st.booleans(),
    desc_act=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 5),
)
def test_any_weight(
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    sym: bool,
    desc_act: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    weight = packed_weight(bits, out_features, in_features, group_size, sym=sym, desc_act=desc_act, seed=seed)
    assert given_back(replace(weight, scales=weight.scales.to(dtype)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("out_features", "in_features"), [(40, 2100), (64, 3072)])
def test_groups_longer_than_a_segment(bits: int, out_features: int, in_features: int) -> None:
    assert given_back(packed_weight(bits, out_features, in_features, 1536, sym=False, desc_act=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_that_belong_to_no_code(bits: int) -> None:
    """Hosts that add to whole words leave something in the last ones."""
    weight = packed_weight(bits, 37, 75, 32, sym=False)
    random = torch.Generator().manual_seed(0)
    qweight, qzeros = (
        torch.randint(-(2**31), 2**31, tensor.shape, generator=random).to(torch.int32)
        for tensor in (weight.qweight, weight.qzeros)
    )
    assert given_back(replace(weight, qweight=qweight, qzeros=qzeros))


def test_scales_that_are_no_numbers_and_no_g_idx() -> None:
    weight = packed_weight(2, 37, 75, 32, sym=False)
    scales = weight.scales.float()
    scales[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
    assert given_back(replace(weight, scales=scales, g_idx=None))
    assert given_back(replace(weight, g_idx=torch.arange(75) // 32))


def test_what_cannot_be_given_back_says_so() -> None:
    weight = packed_weight(3, 20, 64, 16, sym=False)
    unused_group = replace(weight, g_idx=torch.tensor([3] * 37 + [0] * 27))
    assert not repack_weight(unused_group).rest.complete
    assert not repack_weight(packed_weight(2, 20, 64, 16, version_1=True)).rest.complete
