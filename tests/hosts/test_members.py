"""`EoRA.apply` with an ensemble's members: what it adds to the output of a kernel that is not the plugin's."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import pytest
import torch

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.formats.factors import Factors
from gptqmodel_eora_ext.kernels.reference import linear
from gptqmodel_eora_ext.kernels.row_weights import Mixture, RowWeights
from tests.kernels.cases import packed_weight, random_factors, random_input

WEIGHT = packed_weight(2, 40, 96, 32)
MEMBERS = (6, 0, 3, 5)
NAMES = ("shared", "none", "math", "code")


def attached(factor_bits: int = 16) -> tuple[EoRA, Mixture, Factors]:
    factors = replace(random_factors(WEIGHT, sum(MEMBERS), factor_bits), members=MEMBERS)
    adapter, mixture = EoRA(), Mixture(NAMES)
    adapter.attach_members(factors, mixture, torch.device("cpu"))
    return adapter, mixture, factors


def added(adapter: EoRA, x: torch.Tensor) -> torch.Tensor:
    return adapter.apply(x=x, out=torch.zeros(*x.shape[:-1], WEIGHT.out_features))


def expected(x: torch.Tensor, factors: Factors, weights: torch.Tensor) -> torch.Tensor:
    given = weights.repeat_interleave(x.shape[0] * x.shape[1] // len(weights), dim=0)
    rows = x.reshape(-1, x.shape[-1]).double()
    both = linear(rows, WEIGHT, factors, weights=given, accumulate=torch.float64)
    return (both - linear(rows, WEIGHT, accumulate=torch.float64)).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
def test_each_sequence_by_its_own_weights(factor_bits: int) -> None:
    adapter, mixture, factors = attached(factor_bits)
    x = random_input(12, 96).reshape(3, 4, 96)
    weights = torch.tensor([[1.0, 0.0, 0.7, 0.0], [1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    with mixture.weighed(RowWeights(weights)):
        torch.testing.assert_close(added(adapter, x).double(), expected(x, factors, weights), rtol=1e-4, atol=1e-4)


def test_the_shared_adapter_alone_where_nothing_was_chosen() -> None:
    adapter, _, factors = attached()
    x = random_input(4, 96).reshape(1, 4, 96)
    alone = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(added(adapter, x).double(), expected(x, factors, alone), rtol=1e-4, atol=1e-4)


def test_repacked_factors_and_copies_keep_their_members() -> None:
    adapter, mixture, factors = attached()
    adapter.repacked()
    copied = copy.deepcopy(adapter)
    x, weights = random_input(2, 96).reshape(2, 1, 96), torch.tensor([[1.0, 0, 0.5, 0], [1.0, 0, 0, 0.5]])
    for one in (adapter, copied):
        assert one.mixture is not None
        with one.mixture.weighed(RowWeights(weights)):
            torch.testing.assert_close(added(one, x).double(), expected(x, factors, weights), rtol=1e-4, atol=1e-4)
    assert copied.mixture is not mixture


def test_rows_that_are_no_whole_number_of_tokens() -> None:
    adapter, mixture, _ = attached()
    with mixture.weighed(RowWeights(torch.ones(3, 4))), pytest.raises(ValueError, match=r"3 sequences.*4 rows"):
        added(adapter, random_input(4, 96))


def test_each_thread_has_its_own_weights() -> None:
    _, mixture, _ = attached()
    seen = []
    with mixture.weighed(RowWeights(torch.ones(1, 4))):
        thread = threading.Thread(target=lambda: seen.append(mixture.now is mixture.shared_alone))
        thread.start()
        thread.join()
        assert mixture.now is not mixture.shared_alone
    assert seen == [True]
