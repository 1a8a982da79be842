"""Several processes: what they send one another, and what they say when one of them is lost."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gptqmodel_eora_ext.capture import OutputErrorMoment, SecondMoment, panels_of
from gptqmodel_eora_ext.capture.second_moment import block_columns
from gptqmodel_eora_ext.system.distributed import (
    WAIT_VARIABLE,
    by_first,
    current,
    deal,
    is_first,
    joined,
    share,
    wait_seconds,
)
from gptqmodel_eora_ext.system.peers import LOST_STATUS

from ..processes import Ended, run, start, wait
from . import together

SCRIPT = str(Path(together.__file__))


@given(items=st.integers(0, 300), size=st.integers(1, 70))
def test_shares_are_in_order_and_nearly_equal(items: int, size: int) -> None:
    shares = [share(items, size, rank) for rank in range(size)]
    assert [one for some in shares for one in some] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(costs=st.lists(st.floats(0.1, 1e12), max_size=60), size=st.integers(1, 8))
def test_dealing_leaves_no_process_far_behind(costs: list[float], size: int) -> None:
    loads = [0.0] * size
    owners = deal(costs, loads)
    for rank in range(size):
        assert loads[rank] == pytest.approx(
            sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank)
        )
    # The bound of list scheduling: the mean and one item more.
    assert max(loads) <= (sum(costs) / size + max(costs, default=0)) * (1 + 1e-9)


@given(features=st.sampled_from([40, 152, 576, 1536]), size=st.integers(1, 8), tokens=st.integers(1, 70))
@settings(max_examples=20, deadline=None)
def test_panels_have_the_bits_of_the_whole(features: int, size: int, tokens: int) -> None:
    """Both of what is summed in panels: GPTQ's whole product, and our triangle added in place."""
    rows = torch.randn(tokens, features, generator=torch.Generator().manual_seed(tokens)).bfloat16().float()
    whole, found = rows.T @ rows, torch.zeros(features, features)
    for _, columns in panels_of(features, size):
        found[:, columns].add_(torch.matmul(rows.T, rows[:, columns]))
    assert torch.equal(found, whole)
    moment, total = SecondMoment(features, "m"), torch.zeros(features, features)
    for _ in range(2):
        moment.add(rows)
        for first, columns in panels_of(features, size, list(block_columns(features))):
            total[first:, columns].addmm_(rows[:, first:].T, rows[:, columns])
    assert torch.equal((total / moment.tokens).tril(), moment.mean().tril())


@given(features=st.integers(1, 700), size=st.integers(1, 64))
@settings(max_examples=50)
def test_panels_cover_a_sum_once(features: int, size: int) -> None:
    whole = Counter(column for _, columns in panels_of(features, size) for column in range(columns.start, columns.stop))
    assert whole == Counter(range(features))
    covered = torch.zeros(features, features, dtype=torch.int32)
    for first, columns in panels_of(features, size, list(block_columns(features))):
        covered[first:, columns] += 1
    assert torch.equal(covered.tril(), torch.ones_like(covered).tril())


def test_a_process_by_itself_has_no_group() -> None:
    written: list[int] = []
    with joined() as group:
        by_first(lambda: written.append(1))
        assert group is None and current() is None and is_first()
    assert written == [1] and not torch.distributed.is_initialized()


@pytest.mark.parametrize("value", ["soon", "0", "-3", "nan"])
def test_a_timeout_that_is_no_number_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WAIT_VARIABLE, value)
    with pytest.raises(ValueError, match=f"{WAIT_VARIABLE} must be a number of seconds above 0, got '{value}'"):
        wait_seconds()


@pytest.mark.usefixtures("one_thread")
def test_ordered_sums_have_the_bits_of_one_process(tmp_path: Path) -> None:
    """Three processes, of which the sums are asked by some."""
    ended = run([SCRIPT, "sums", str(tmp_path)], 3)
    assert [one.status for one in ended] == [0, 0, 0], ended
    moment, error = SecondMoment(together.IN, "m"), OutputErrorMoment(*together.weights(), "m")
    for window in together.windows():
        moment.add(window)
        error.add(window)
    first, last = load_file(tmp_path / "0.safetensors"), load_file(tmp_path / "2.safetensors")
    for found in (first, last):
        assert torch.equal(found["C"], moment.mean())
        assert int(found["tokens"]) == moment.tokens
    assert torch.equal(first["S"], error.mean())
    assert torch.equal(first["energies"], error.energies())
    assert torch.equal(first["signal"], torch.tensor(error.signal))
    assert not (tmp_path / "1.safetensors").exists()


def _the_others_name_it(ended: list[Ended], case: str, what: str) -> None:
    """All but rank 1 end by the status of a lost process, and name rank 1, its host and what it was at."""
    for rank, one in enumerate(ended):
        if rank != 1:
            assert one.status == LOST_STATUS, one.output
            assert f"error: EoRA: rank 1 ({os.uname().nodename}, process " in one.output
            assert f"last at: layer 3, case {case}) {what}" in one.output


def test_the_others_end_and_name_a_process_that_was_killed(tmp_path: Path) -> None:
    ended = run([SCRIPT, "killed", str(tmp_path)], 2)
    assert ended[1].status == -signal.SIGKILL
    _the_others_name_it(ended, "killed", "was killed or has crashed")


@pytest.mark.distributed
def test_the_others_end_and_tell_the_error_of_a_process_that_failed(tmp_path: Path) -> None:
    _the_others_name_it(run([SCRIPT, "fails", str(tmp_path)], 2), "fails", "failed: OSError: no space left on device")


@pytest.mark.distributed
@pytest.mark.parametrize("case, what", [("stopped", "has not been heard of for 5 s"), ("hangs", "did not come within")])
def test_the_others_end_and_name_a_process_that_does_not_go_on(case: str, what: str, tmp_path: Path) -> None:
    """Stopped, a process does not even beat; in an endless computation it does."""
    processes = start([SCRIPT, case, str(tmp_path)], 3, {WAIT_VARIABLE: "5"})
    others = [one for rank, one in enumerate(processes) if rank != 1]
    outputs = [one.communicate(timeout=300)[0] for one in others]
    processes[1].kill()
    ended = [Ended(one.returncode, output) for one, output in zip(others, outputs, strict=True)]
    wait([processes[1]])
    _the_others_name_it([ended[0], ended[0], ended[1]], case, what)
