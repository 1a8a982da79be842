"""Modules worked on side by side: what one takes is mostly small operations, which more processors do not speed up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Modules at a time, each with matrices of its own in memory.
MOST_WORKERS = 4


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """Results in the order of ``items``; torch's threads are shared out. On a GPU one after the other.

    Args:
        work: what is done to each; called from several threads.
        items: all are taken at once.
        device: where it is done.
    """
    threads = torch.get_num_threads()
    workers = min(threads, MOST_WORKERS)
    if device.type != "cpu" or workers == 1:
        yield from map(work, items)
        return

    def with_its_share(item: Item) -> Result:
        # A setting of the calling thread, and of those that start later.
        torch.set_num_threads(threads // workers)
        return work(item)

    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="eora") as pool:
            yield from pool.map(with_its_share, items)
    finally:
        torch.set_num_threads(threads)
