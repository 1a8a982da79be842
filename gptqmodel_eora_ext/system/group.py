"""What the processes of a run send one another: tensors, and JSON. Nothing is pickled.

Every exchange waits for the slowest process. Where one is lost meanwhile, it fails by `PeerLost`, which names it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .peers import PeerLost, Peers

# After an exchange has failed, so many seconds are spent on finding out who was lost.
LOOK_SECONDS = 5.0


class Group:
    """The processes of a run. Made by `joined`; its methods are called on one thread, in the same order everywhere.

    Args:
        peers: the processes as this one sees them.
        local_rank: number of this process among those of its host.
        device: what this process computes on.
        wait: seconds that an exchange waits at most.

    Attributes:
        rank: number of this process, from 0.
        size: how many processes there are.
        sent: bytes of tensors that this process has sent so far. A broadcast counts once, whoever passes it on.
    """

    def __init__(self, peers: Peers, local_rank: int, device: torch.device, wait: float) -> None:
        self.peers = peers
        self.rank, self.size = peers.rank, peers.size
        self.local_rank = local_rank
        self.device = device
        self.sent = 0
        self._wait = wait
        self._pending: list[tuple[Any, torch.Tensor]] = []

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def at(self, phase: str) -> None:
        """Tell the others what this process is at, for their messages. Costs no exchange."""
        self.peers.at(phase)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send a tensor to one process, and go on; it must not be changed before `finish_sending`."""
        with self._exchange(f"sending to rank {to}"):
            self._pending.append((dist.isend(tensor, to), tensor))
        self.sent += tensor.nbytes

    def finish_sending(self) -> None:
        """Wait until everything that was sent has arrived."""
        with self._exchange("sending"):
            for work, _ in self._pending:
                work.wait()
        self._pending.clear()

    def receive(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Fill a tensor with what one process sends, and return it."""
        with self._exchange(f"receiving from rank {source}"):
            dist.recv(tensor, source)
        return tensor

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Give every process the tensor of one; the others pass one of the same shape and dtype to fill."""
        with self._exchange(f"waiting for rank {source}"):
            dist.broadcast(tensor, source)
        self.sent += tensor.nbytes if source == self.rank else 0
        return tensor

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a tensor by its sum over all processes, in the tensor's own dtype."""
        with self._exchange("adding up"):
            dist.all_reduce(tensor)
        self.sent += 2 * tensor.nbytes * (self.size - 1) // self.size
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """What every process passes, in the order of ranks; values are JSON, so floats arrive bit for bit."""
        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._exchange("gathering"):
            dist.all_gather(lengths, torch.tensor([len(raw)]))
            longest = max(int(one) for one in lengths)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(raw)] = raw
            found = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(found, padded)
        self.sent += longest
        return [json.loads(bytes(one[: int(length)].numpy())) for one, length in zip(found, lengths, strict=True)]

    def spread(
        self, owners: Mapping[str, int], made: Mapping[str, tuple[Any, Mapping[str, torch.Tensor]]]
    ) -> Iterator[tuple[str, Any, dict[str, torch.Tensor]]]:
        """Yield what the owner of each item has made of it, in every process; one item is in memory at a time.

        Args:
            owners: item → rank, the same in all processes.
            made: this process's items → what can be told in JSON, and tensors by name.

        Yields:
            Item, what is told of it, and its tensors on the CPU; in the order of ``owners``.
        """
        told: dict[str, Any] = {}
        shapes = {name: {key: layout(one) for key, one in tensors.items()} for name, (_, tensors) in made.items()}
        for one in self.gather({name: [header, shapes[name]] for name, (header, _) in made.items()}):
            told |= one
        for name, owner in owners.items():
            header, layouts = told[name]
            got = {}
            for key, (shape, dtype) in layouts.items():
                tensor = made[name][1][key].cpu().contiguous() if name in made else unfilled(shape, dtype)
                got[key] = self.broadcast(tensor, owner) if tensor.numel() else tensor
            yield name, header, got

    def joined_rows(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The rows that all processes have under each name, those of rank 0 first; on the group's device.

        Args:
            rows: by name, n × features; a process may lack a name that others have.
        """
        told = self.gather({name: layout(one) for name, one in rows.items()})
        found: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys(name for one in told for name in one):
            parts = []
            for rank, one in enumerate(told):
                if name in one:
                    mine = rows[name].to(self.device).contiguous() if rank == self.rank else None
                    part = mine if mine is not None else unfilled(*one[name]).to(self.device)
                    parts.append(self.broadcast(part, rank))
            found[name] = torch.cat(parts)
        return found

    def in_turn(self, do: Callable[[], None]) -> None:
        """Have each process do something while the others wait, in the order of ranks."""
        for rank in range(self.size):
            if rank == self.rank:
                do()
            self.barrier(f"rank {rank} at its turn")

    def barrier(self, what: str) -> None:
        """Wait until every process has come here."""
        with self._exchange(what):
            # Of CPU tensors, so that it needs no GPU even between processes that compute on some.
            dist.all_reduce(torch.zeros(1))

    def agree(self, told: dict[str, Any]) -> None:
        """Refuse to go on where processes were started on different things.

        Args:
            told: what has to be the same in all processes, by name; JSON.

        Raises:
            ValueError: naming what differs, the ranks, and both values.
        """
        everybody = self.gather(told)
        first = everybody[0]
        for rank, other in enumerate(everybody):
            for name in sorted({*first, *other}):
                if first.get(name) != other.get(name):
                    raise ValueError(
                        f"EoRA: the processes of this run differ in {name}: rank 0 has {first.get(name)!r}, "
                        f"{self.peers.named(rank)} has {other.get(name)!r}. Start all of them by one command, on the "
                        f"same model, data and versions."
                    )

    @contextmanager
    def _exchange(self, what: str) -> Iterator[None]:
        """Within the block this process waits for others; their loss is told by name."""
        if (lost := self.peers.lost()) is not None:
            raise PeerLost(lost)
        start = time.monotonic()
        self.peers.waits(True)
        try:
            yield
        except RuntimeError as error:
            raise PeerLost(self._who(what, start, error)) from error
        finally:
            self.peers.waits(False)

    def _who(self, what: str, start: float, error: RuntimeError) -> str:
        lost = self.peers.look(LOOK_SECONDS)
        if lost is not None:
            return lost
        if busy := self.peers.busy():
            named = " and ".join(self.peers.named(rank) for rank in busy)
            return f"{named} did not come within {time.monotonic() - start:.0f} s while the others waited ({what})"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"an exchange failed in rank {self.rank} while {what} ({reason})"


def layout(tensor: torch.Tensor) -> list[Any]:
    """Shape and dtype, as JSON."""
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def unfilled(shape: Sequence[int], dtype: str) -> torch.Tensor:
    """A tensor on the CPU of what `layout` tells, to receive values in."""
    return torch.empty(shape, dtype=getattr(torch, dtype))
