"""A nested state sent from one process to another: JSON, and tensors beside it, of which nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .distributed import share
from .group import Group, layout, unfilled
from .state_file import put_together, taken_apart


def send_state(group: Group, state: Any, to: int, known: Mapping[int, str] | None = None) -> None:
    """Send a state to one process, which calls `receive_state`. In memory besides: a copy of its largest tensor.

    Args:
        group: the processes.
        state, known: as `write_state` takes them.
        to: rank.
    """
    described, tensors = taken_apart(state, known)
    told = json.dumps([described, {name: layout(one) for name, one in tensors.items()}]).encode()
    group.send(torch.tensor([len(told)]), to)
    group.send(torch.frombuffer(bytearray(told), dtype=torch.uint8), to)
    for one in tensors.values():
        if one.numel():
            group.send(one.detach().to("cpu").contiguous(), to)
        group.finish_sending()


def receive_state(
    group: Group, source: int, known: Mapping[str, torch.Tensor] | None = None, *, stays: bool = False
) -> Any:
    """The state that a process sends.

    Args:
        group: the processes.
        source: rank.
        known: the tensors that are not sent, by the names that the sender has given them.
        stays: whether tensors stay on the CPU; otherwise each goes to the device that it was on there.

    Raises:
        KeyError: for a tensor that is told by a name which ``known`` lacks.
    """
    length = group.receive(torch.zeros(1, dtype=torch.int64), source)
    told = group.receive(torch.empty(int(length), dtype=torch.uint8), source)
    described, layouts = json.loads(bytes(told.numpy()))
    tensors = {}
    for name, one in layouts.items():
        tensor = unfilled(*one)
        tensors[name] = group.receive(tensor, source) if tensor.numel() else tensor
    return put_together(described, tensors, known, stays=stays)


def from_first(group: Group, state: Any) -> Any:
    """A state that rank 0 has, in every process; what the others pass does not count. All call this together.

    Args:
        group: the processes.
        state: as `write_state` takes it.
    """
    made = {"state": taken_apart(state)} if group.is_first else {}
    [(_, described, tensors)] = group.spread({"state": 0}, made)
    return put_together(described, tensors)


def joined(parts: Sequence[Any]) -> Any:
    """Lists of an item a window as one process would have them, of those that several have, in the order of ranks.

    Args:
        parts: of each process lists, in dicts to any depth; None where there is nothing.
    """
    first = parts[0]
    if isinstance(first, Mapping):
        return {key: joined([part[key] for part in parts]) for key in first}
    return None if first is None else [one for part in parts for one in part]


def shared_out(whole: Any, size: int, rank: int) -> Any:
    """What one of some processes has of lists of an item a window (`distributed.share`); the reverse of `joined`."""
    if isinstance(whole, Mapping):
        return {key: shared_out(one, size, rank) for key, one in whole.items()}
    if whole is None:
        return None
    mine = share(len(whole), size, rank)
    return whole[mine.start : mine.stop]
