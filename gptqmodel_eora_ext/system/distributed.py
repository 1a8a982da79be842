"""Several processes that work on one run, by torch.distributed: gloo between CPUs, NCCL between GPUs.

`joined` makes this process one of a group where `torchrun` (or whatever sets `RANK` and `WORLD_SIZE`) has started
several; `current` gives the group to whoever has something to share. A process by itself has no group: `current` is
None, and nothing is set up, sent or copied.

What can be sent stands in `system.group`. Every exchange waits at most `wait_seconds()` for the slowest process; who is
lost meanwhile is noticed by `system.peers`, and named.

NCCL has not been run here: the code was written and tested on CPUs with gloo.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .group import LOOK_SECONDS, Group
from .peers import DONE, FAILED, LOST, SILENT_SECONDS, PeerLost, Peers

WAIT_VARIABLE = "EORA_DISTRIBUTED_TIMEOUT"
# Seconds that an exchange waits for the slowest process. One process solves while the others wait for its result, and
# the largest module of a 72B model takes minutes on a CPU.
DEFAULT_WAIT = 1800.0

T = TypeVar("T")


_current: Group | None = None


def current() -> Group | None:
    """The group that this process belongs to; None for a process by itself."""
    return _current


def is_first() -> bool:
    """Whether this process writes and reports: the first of a group, or one by itself."""
    return _current is None or _current.is_first


def refuse_shared(what: str, instead: str) -> None:
    """Refuse to do in several processes what one of them does alone.

    Args:
        what: begins the sentence.
        instead: what to do, without a full stop.

    Raises:
        NotImplementedError: in one of several processes.
    """
    if _current is not None:
        raise NotImplementedError(
            f"EoRA: {what} cannot be shared out between processes, and {_current.size} were started. {instead}."
        )


def by_first(write: Callable[[], object]) -> None:
    """Have rank 0 write something, and the others wait until it has; a process by itself writes it."""
    if is_first():
        write()
    if _current is not None:
        _current.barrier("waiting for rank 0 to write")


def as_first_says(decide: Callable[[], T], error: type[Exception]) -> T:
    """What rank 0 decides, in every process, where it alone can know; a process by itself decides.

    Args:
        decide: called in rank 0 alone; what it returns is JSON.
        error: what it may raise. Then all raise it, with the message of rank 0.
    """
    if _current is None:
        return decide()
    found = failed = None
    if _current.is_first:
        try:
            found = decide()
        except error as raised:
            failed = raised
    told, message = _current.gather([found, None if failed is None else str(failed)])[0]
    if failed is not None:
        raise failed
    if message is not None:
        raise error(message)
    answer: T = told
    return answer


def launched() -> int:
    """How many processes this one was started among; 1 for one by itself."""
    try:
        return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
    except (KeyError, ValueError):
        return 1


def wait_seconds() -> float:
    """Seconds that an exchange waits for the slowest process, by `WAIT_VARIABLE`.

    Raises:
        ValueError: for a value that is no positive number.
    """
    asked = os.environ.get(WAIT_VARIABLE)
    try:
        seconds = float(asked) if asked else DEFAULT_WAIT
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{WAIT_VARIABLE} must be a number of seconds above 0, got {asked!r}.")
    return seconds


@contextmanager
def joined() -> Iterator[Group | None]:
    """Within the block this process is one of the group that it was started among; yields None for one by itself.

    On the way out the others are told how it ended. A process that receives SIGTERM within the block, as torchrun sends
    it when another one has ended, says whom it has lost before it ends.

    Raises:
        ValueError: for a timeout that is no number, or fewer GPUs than processes on this host.
        PeerLost: from any exchange, where another process failed, was killed or does not answer.

    Example:
        >>> # torchrun --nproc-per-node 2 script.py
        >>> with joined():
        ...     model.quantize(calibration, adapter=EoRA(rank=64))
        ...     model.save("out")  # rank 0 writes, the other waits
    """
    global _current
    if _current is not None or launched() == 1:
        yield _current
        return
    wait = wait_seconds()
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    device = _own_device(local_rank)
    peers = _meet(wait, device)
    group = Group(peers, local_rank, device, wait)
    usual = _heed_sigterm(peers)
    _current = group
    try:
        with _ending_well(group):
            yield group
    except PeerLost as error:
        peers.end(LOST, error.lost)
        raise
    except BaseException as error:
        if not (isinstance(error, SystemExit) and error.code in (0, None)):
            peers.end(FAILED, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        raise
    finally:
        _current = None
        if usual is not None:
            signal.signal(signal.SIGTERM, usual)


@contextmanager
def _ending_well(group: Group) -> Iterator[None]:
    """Once the block is done, or was left by an exit with status 0, wait for the others and take leave of them."""
    try:
        yield
    except SystemExit as left:
        if left.code not in (0, None):
            raise
        _take_leave(group)
        raise
    _take_leave(group)


def _take_leave(group: Group) -> None:
    group.barrier("waiting for the others to finish")
    group.peers.end(DONE)
    dist.destroy_process_group()


def _own_device(local_rank: int) -> torch.device:
    """The GPU of this process, made the only one that it sees; the CPU where there is none.

    Hosts use every GPU they see, so the others are hidden before CUDA is initialised.
    """
    # Asked through the driver's management library, since CUDA reads the variable once, when it is initialised.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return torch.device("cpu")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if here > count:
        raise ValueError(
            f"EoRA: {here} processes on this host share {count} GPUs; NCCL needs one for each. Start torchrun with "
            f"--nproc-per-node {count}, or set CUDA_VISIBLE_DEVICES= to compute on the CPU."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = visible.split(",")[local_rank] if visible else str(local_rank)
    os.environ["CUDA_VISIBLE_DEVICES"] = chosen
    return torch.device("cuda", 0)


def _meet(wait: float, device: torch.device) -> Peers:
    """Find the other processes, and begin to beat."""
    # Builds of torch without distributed lack these; they are for a process by itself.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(seconds=wait)
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=PrefixStore("eora/group", store), rank=rank, world_size=size, timeout=timeout
    )
    # Beats must not wait for an exchange of the main thread, so they have a connection of their own.
    peers = Peers(PrefixStore("eora/peers", store.clone()), rank, size, min(SILENT_SECONDS, wait))
    peers.start()
    return peers


def _heed_sigterm(peers: Peers) -> Any:
    """Say whom this process has lost when it is asked to end; returns the handler before, None in a thread."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def lost(number: int, frame: FrameType | None) -> None:
        if (found := peers.look(LOOK_SECONDS)) is not None:
            # Not by an exception: it would come up in the middle of whatever runs, which may catch it.
            peers.leave(found)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    return signal.signal(signal.SIGTERM, lost)


def share(items: int, size: int, rank: int) -> range:
    """Which of a number of items a process takes: a contiguous share, in order, all shares within one of each other.

    Example:
        >>> [list(share(5, 2, rank)) for rank in range(2)]
        [[0, 1, 2], [3, 4]]
    """
    least, more = divmod(items, size)
    start = rank * least + min(rank, more)
    return range(start, start + least + (rank < more))


def deal(costs: Sequence[float], loads: list[float]) -> list[int]:
    """Give each item to the process that has least to do, the dearest item first.

    Args:
        costs: of the items, in any unit.
        loads: of the processes so far, in the same unit; what is dealt is added.

    Returns:
        The rank of each item.

    Example:
        >>> deal([3, 1, 2], [0.0, 0.0])
        [0, 1, 1]
    """
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda one: (-costs[one], one)):
        owners[index] = min(range(len(loads)), key=lambda rank: (loads[rank], rank))
        loads[owners[index]] += costs[index]
    return owners
