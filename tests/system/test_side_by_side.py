"""Modules worked on by several threads give what one thread gives, in their order."""

import threading

import pytest
import torch

from gptqmodel_eora_ext.system.side_by_side import side_by_side

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_in_order_by_several_threads(two_threads: None) -> None:
    """The first waits for the second, which thus runs beside it."""
    second = threading.Event()
    shares = []

    def work(item: int) -> int:
        shares.append(torch.get_num_threads())
        if item == 0:
            assert second.wait(10)
        if item == 1:
            second.set()
        return item * item

    assert list(side_by_side(work, range(5), CPU)) == [0, 1, 4, 9, 16]
    assert shares == [1] * 5
    assert torch.get_num_threads() == 2


def test_an_error_ends_it(two_threads: None) -> None:
    done = []

    def work(item: int) -> None:
        if item == 2:
            raise ValueError("two")
        done.append(item)

    with pytest.raises(ValueError, match="two"):
        list(side_by_side(work, range(1000), CPU))
    assert torch.get_num_threads() == 2 and len(done) < 1000


def test_one_after_the_other_elsewhere(two_threads: None) -> None:
    threads = {threading.current_thread()}
    found = side_by_side(lambda item: threads.add(threading.current_thread()) or item, range(3), torch.device("meta"))
    assert list(found) == [0, 1, 2] and len(threads) == 1
