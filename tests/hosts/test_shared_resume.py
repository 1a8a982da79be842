"""What enters a layer, gathered from several processes and shared out between any number of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptqmodel_eora_ext.hosts.gptqmodel.resume import digest_of, digests
from gptqmodel_eora_ext.hosts.gptqmodel.shared_resume import check_batches
from gptqmodel_eora_ext.system.distributed import share
from gptqmodel_eora_ext.system.sent_state import joined, shared_out


@given(batches=st.integers(1, 60), before=st.integers(1, 9), after=st.integers(1, 9))
def test_any_number_of_processes_goes_on_with_what_any_other_has_kept(batches: int, before: int, after: int) -> None:
    whole = {"layer_inputs": [[number] for number in range(batches)], "position_ids": list(range(batches)),
             "src_inputs": []}  # fmt: skip
    check_batches(whole, batches)
    parts = [shared_out(whole, before, rank) for rank in range(before)]
    assert joined(parts) == whole
    for rank in range(after):
        part = shared_out(joined(parts), after, rank)
        check_batches(part, len(share(batches, after, rank)))
        assert part["position_ids"] == list(share(batches, after, rank)) and part["src_inputs"] == []


def test_lists_of_some_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="`position_ids` has 2 items for 3 batches"):
        check_batches({"layer_inputs": [0, 1, 2], "position_ids": [0, 1]}, 3)


def test_digests_of_several_processes_are_that_of_one() -> None:
    tensors = {f"/0/cache/layer_inputs/{number}/0": torch.full((2, 3), float(number)) for number in range(12)}
    first, second = dict(list(tensors.items())[:5]), dict(list(tensors.items())[5:])
    assert digest_of(digests(second) | digests(first)) == digest_of(digests(tensors))
    for other in (tensors["/0/cache/layer_inputs/3/0"].to(torch.bfloat16), torch.full((3, 2), 3.0), torch.zeros(2, 3)):
        changed = {**tensors, "/0/cache/layer_inputs/3/0": other}
        assert digest_of(digests(changed)) != digest_of(digests(tensors))
