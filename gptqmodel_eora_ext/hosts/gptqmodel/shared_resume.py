"""Resuming a run that several processes share: rank 0 keeps what one process would, so any number of them goes on.

Rank 0 packs and saves, so it alone has packed modules; and hosts may share no file system. After each layer it receives
the activations of the others' windows, and writes them in the order of windows. On resuming it gives each process its
share of them, for as many processes as there are then. All know the finished layers' factors afterwards, as without an
interruption; the weights of those layers are in rank 0 alone.

What enters the first layer is computed by each process for its own windows, and is neither sent nor written: its
tensors (masks, positions) stand in a state by their names, which count windows through all processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gptqmodel.looper.extension import LoopContext

from ...loop.resume import Keeping, layer_file, read_factors
from ...system.distributed import as_first_says, share
from ...system.group import Group
from ...system.kept import ResumeError, Stopped
from ...system.sent_state import from_first, joined, receive_state, send_state, shared_out
from ...system.state_file import put_together, taken_apart
from .known_weights import let_go_of_weight
from .resume import LayerKeeper, digest_of, digests
from .run import CompensationRun


def keeper_of(run: CompensationRun, keeping: Keeping, asked: Mapping[str, Any]) -> LayerKeeper:
    """What keeps a run's layers, in this process.

    Args:
        run: whose layers are kept.
        keeping: where.
        asked: see `Keeping.open`.

    Raises:
        ResumeError: see there; in all processes.
    """
    if run.group is None:
        return LayerKeeper(run, keeping.open(asked), keeping.every)
    keeping.open_by_first(asked)
    return SharedLayerKeeper(run, keeping, run.group)


def check_batches(cache: Mapping[str, Sequence[Any]], batches: int) -> None:
    """Refuse what cannot be shared out batch by batch.

    Args:
        cache: an `InputCache` as a dict; each of its lists has one item a batch, or none at all.
        batches: how many there are.

    Raises:
        ValueError: for a list that has items for some batches only.
    """
    for key, items in cache.items():
        if len(items) not in (0, batches):
            raise ValueError(
                f"EoRA: `{key}` has {len(items)} items for {batches} batches, so what enters a layer cannot be kept "
                f"among several processes. Pass --no-resume (in Python no `checkpoint`)."
            )


class SharedLayerKeeper(LayerKeeper):
    """`LayerKeeper` of one of several processes, which call its methods at the same moments.

    In memory besides, in rank 0: what enters a layer, of all windows, while it is written.

    Args:
        run: whose factors are kept.
        keeping: opened by rank 0.
        group: the processes.
    """

    def __init__(self, run: CompensationRun, keeping: Keeping, group: Group) -> None:
        super().__init__(run, keeping.kept, keeping.every)
        self._keeping, self._group = keeping, group
        self._batches = 0
        # Of all processes: name of what enters the first layer → digest. What another one has is an empty tensor here.
        self._digests: dict[str, str] = {}
        self._absent: dict[str, torch.Tensor] = {}
        self._found: Any = None

    def on_start(self, context: LoopContext) -> int:
        """See `LayerKeeper`."""
        group = self._group
        self._context, self._steps = context, context.plan.steps
        group.at("looking for finished layers")
        counts: list[int] = group.gather(next(iter(self._processors()))["num_batches"])
        self._batches = sum(counts)
        self._begin(sum(counts[: group.rank]))
        for processor in self._processors():
            check_batches(processor["cache"], counts[group.rank])
        for told in group.gather(digests(self._begun)):
            self._digests |= told
        self._digest = digest_of(self._digests)
        self._absent = {name: torch.empty(0) for name in self._digests if name not in self._begun}
        steps = as_first_says(self._steps_before, ResumeError)
        if not steps:
            return 0
        for number in range(steps):
            self._take_layer(number)
        group.at("sharing out what enters the next layer")
        self._load(self._mine())
        return self._go_on(steps)

    def _steps_before(self) -> int:
        """In rank 0: read what the next layer starts from; how many steps were finished."""
        self._found = self._read({**self._begun, **self._absent})
        return 0 if self._found is None else int(self._found["steps"])

    def _take_layer(self, number: int) -> None:
        """Rank 0 puts a finished layer in place; all get its factors, and the others let go of its weights."""
        factors: dict[str, Any] = {}

        def put() -> None:
            layer = self._kept.read(layer_file(number))
            self._put_in_place(layer)
            factors.update(layer["factors"])

        as_first_says(put, ResumeError)
        found = from_first(self._group, factors)
        if not self._group.is_first:
            assert self._context is not None
            self._run.factors.update(read_factors(found))
            for name in found:
                let_go_of_weight(self._context.model.model.get_submodule(name))

    def _mine(self) -> Any:
        """This process's share of what the next layer starts from."""
        group = self._group
        # What another process begins with is recognised by its digest, since a state may name an equal tensor of
        # another window.
        begun = {self._digests[name]: one for name, one in self._begun.items()}
        if not group.is_first:
            return receive_state(group, 0, begun)
        known = {id(one): self._digests[name] for name, one in {**self._absent, **self._begun}.items()}
        parts = self._parts(self._found)
        self._found = None
        for rank in range(1, group.size):
            send_state(group, parts[rank], rank, known)
        return put_together(*taken_apart(parts[0], known), begun)

    def _parts(self, state: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What each process starts the next layer from."""
        size = self._group.size
        parts = []
        for rank in range(size):
            count = len(share(self._batches, size, rank))
            processors = [
                {**one, "cache": shared_out(one["cache"], size, rank), "num_batches": count}
                for one in state["processors"]
            ]
            # Seconds are added up over processes in the end.
            run = state["run"] if rank == 0 else {**state["run"], "seconds": 0.0}
            parts.append({**state, "processors": processors, "run": run})
        return parts

    def _keep(self, done: int) -> None:
        group = self._group
        group.at(f"keeping {self._steps[done - 1].name}")
        seconds = sum(group.gather(self._run.seconds))
        own = [processor["cache"] for processor in self._processors()]
        if group.is_first:
            others = [receive_state(group, rank, self._absent, stays=True) for rank in range(1, group.size)]
            state = self._next(done)
            processors = [
                {**one, "cache": joined(caches), "num_batches": self._batches}
                for one, *caches in zip(state["processors"], own, *others, strict=True)
            ]
            state |= {"processors": processors, "run": {**state["run"], "seconds": seconds}}
            self._write(state, self._names | {id(one): name for name, one in self._absent.items()})
        else:
            send_state(group, own, 0, self._names)
        self._last = done
        # Asked of one process, all stop after the same layer.
        if any(group.gather(self._keeping.stopping())):
            raise Stopped(self._keeping.root)
