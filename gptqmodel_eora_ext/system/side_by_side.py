"""Several modules worked on at the same time: one takes mostly small operations, which more threads do not speed up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# No more modules than this at a time, since each has matrices of its own in memory.
MOST_WORKERS = 4


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """Yield the results of ``work`` in the order of ``items``. On a CPU the workers share torch's threads among them.

    Args:
        work: what is done to each item; called from several threads. Its error is raised in place of its result.
        items: what is worked on; all are taken from the iterable at once.
        device: where the work is done; on a GPU it is done one item after the other.
    """
    threads = torch.get_num_threads()
    workers = min(threads, MOST_WORKERS)
    if device.type != "cpu" or workers == 1:
        yield from map(work, items)
        return

    def with_its_share(item: Item) -> Result:
        # torch keeps this setting for each thread, so every worker has to set its own.
        torch.set_num_threads(threads // workers)
        return work(item)

    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="eora") as pool:
            yield from pool.map(with_its_share, items)
    finally:
        torch.set_num_threads(threads)
