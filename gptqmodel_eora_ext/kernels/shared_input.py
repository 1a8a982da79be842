"""Modules that read the same input (q, k and v; gate and up), computed together when the first of them is called.

What the others will ask for is kept until they do. A kept result must serve only the call it was made for, so it is
given out where all of this holds, and computed anew otherwise:

- The input is the same tensor object, and nobody wrote to it since. On a CPU its bytes are kept and compared, which
  sees every write, in inference mode too, where tensors do not count their writes; an input of over
  `MOST_COMPARED_BYTES` is not shared. Elsewhere to compare would be to wait for the device, so the tensor's count of
  writes is compared, and a tensor without one, made in inference mode, is not shared. (A kernel that writes through a
  bare pointer is not counted, there or by autograd.)
- The module that asks is as it was: its weight, bias, adapter and factors are the same tensors, not written to
  (`SharesInput.state`). The others of the group need not be asked, since no result depends on them.
- It asks under the same weights of an ensemble's members (`SharesInput.weighed_by`).
- It asks from the same thread. Each thread keeps its own.

While `torch.compile` traces, none of this can be asked, and each module goes alone, by a GPU's launches as they were
prepared before: an adapter that changes later asks for compiling again.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..formats.packed_weights import LayoutError
from .versions import unchanged

# Modules of one parent that read the same input, by the names that decoders of the Llama lineage give them. A model
# that uses the names otherwise only loses the common call (`SharedInput`).
SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Bytes of an input on a CPU that are kept and compared: 128 rows of 4096 in 16 bits. Of more rows the product takes so
# long that what is shared of it does not count.
MOST_COMPARED_BYTES = 1 << 20
# Rounds of a group that go alone after an input was not shared, doubled by each further one that was not: an exception
# in between costs one round, and a model that never shares computes in vain once in so many rounds.
MOST_ROUNDS_ALONE = 256

# What computes modules together: x to the y of each.
Joint = Callable[[torch.Tensor], Sequence[torch.Tensor]]


class SharesInput:
    """A kernel that can be computed together with others that read its input.

    Its forward calls `shared`, at first a `SharedInput` of itself alone, with itself and x, where it is `joinable`.
    """

    shared: SharedInput

    @property
    def joinable(self) -> bool:
        """Whether it can be computed so where its weight lies now."""
        raise NotImplementedError

    @property
    def weighed_by(self) -> object:
        """What the members of its adapter are weighed by now, another object whenever that changes; None for one
        adapter."""
        return None

    def state(self) -> tuple[Any, ...]:
        """All that its y depends on beside x and `weighed_by`: it is computed anew when one of these is another object
        or number."""
        raise NotImplementedError

    @classmethod
    def join(cls, modules: Sequence[Any]) -> Joint:
        """Modules of this class and of one device, ready to be computed together.

        Raises:
            LayoutError: when they cannot be, or a checkpoint's tensors do not belong together.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class _Prepared:
    """Modules ready to be computed together, and the state of each that they were made ready in.

    ``joint`` is None where they cannot be: each goes alone until one of them changes.
    """

    states: dict[int, tuple[Any, ...]]
    joint: Joint | None


class _Kept:
    """Results that wait for their modules, and what tells whether the input is still what it was."""

    __slots__ = ("mark", "prepared", "weights", "x", "ys")

    def __init__(
        self, x: torch.Tensor, mark: bytes | int, ys: dict[int, torch.Tensor], prepared: _Prepared, weights: object
    ) -> None:
        self.x, self.mark, self.ys, self.prepared, self.weights = x, mark, ys, prepared, weights


class _OfThread(threading.local):
    """What one thread keeps of a group: results, rounds that are left to go alone, and how many it was last time."""

    kept: _Kept | None = None
    calls_alone = 0
    rounds = 0


def _mark(x: torch.Tensor) -> bytes | int | None:
    """What is another one once x was written to; None where nothing tells."""
    if not x.is_cpu:
        return None if x.is_inference() else x._version
    nbytes = x.nbytes
    if nbytes > MOST_COMPARED_BYTES or not x.is_contiguous():
        return None
    return ctypes.string_at(x.data_ptr(), nbytes)


class SharedInput:
    """Modules that read the same input, computed together when the first of them is called.

    Where one of them is called with something else while results wait, the input was not shared, and the group goes
    alone for a while (`MOST_ROUNDS_ALONE`).

    Args:
        modules: of one class, that `join` takes.
    """

    def __init__(self, modules: Sequence[SharesInput]) -> None:
        self._modules = tuple(modules)
        self._prepared: _Prepared | None = None
        self._mine = _OfThread()
        # Each by itself: what its `shared` was before, and has prepared.
        self._alone: dict[int, SharedInput] = {}
        if len(modules) > 1:
            self._alone = {id(one): one.shared if one.shared.alone else SharedInput([one]) for one in modules}

    def __call__(self, module: SharesInput, x: torch.Tensor) -> torch.Tensor:
        """y of ``module``."""
        if not self._alone:
            return self.prepare()(x)[0]
        if torch.compiler.is_compiling():
            return self._by_itself(module, x)
        mine = self._mine
        kept = mine.kept
        if kept is not None:
            if kept.x is x and kept.weights is module.weighed_by and _mark(x) == kept.mark:
                return self._kept(kept, module, x)
            mine.kept = None
            mine.rounds = min(2 * mine.rounds or 1, MOST_ROUNDS_ALONE)
            mine.calls_alone = mine.rounds * len(self._modules)
        if mine.calls_alone:
            mine.calls_alone -= 1
            return self._by_itself(module, x)
        mark = _mark(x)
        prepared = None if mark is None else self._ready(module)
        if mark is None or prepared is None or prepared.joint is None:
            return self._by_itself(module, x)
        weights = module.weighed_by
        ys = dict(zip(prepared.states, prepared.joint(x), strict=True))
        y = ys.pop(id(module))
        mine.kept = _Kept(x, mark, ys, prepared, weights)
        return y

    def _kept(self, kept: _Kept, module: SharesInput, x: torch.Tensor) -> torch.Tensor:
        """y of a module that is called with the input that results wait for."""
        mine = self._mine
        y = kept.ys.pop(id(module), None)
        if not kept.ys:
            mine.kept, mine.rounds = None, 0
        if y is None:
            return self._by_itself(module, x)
        if unchanged(kept.prepared.states[id(module)], module.state()):
            return y
        self._prepared = None
        return self._by_itself(module, x)

    def _by_itself(self, module: SharesInput, x: torch.Tensor) -> torch.Tensor:
        return self._alone[id(module)](module, x)

    @property
    def alone(self) -> bool:
        """Whether there is one module only."""
        return not self._alone

    def prepare(self) -> Joint:
        """What computes the modules together, prepared now unless it is.

        Raises:
            LayoutError: as `SharesInput.join`.
        """
        prepared = self._prepared
        if prepared is not None and torch.compiler.is_compiling() and prepared.joint is not None:
            return prepared.joint
        if (
            prepared is None
            or prepared.joint is None
            or not all(unchanged(prepared.states[id(one)], one.state()) for one in self._modules)
        ):
            states = {id(one): one.state() for one in self._modules}
            self._prepared = _Prepared(states, None)
            prepared = self._prepared = _Prepared(states, self._modules[0].join(self._modules))
        assert prepared.joint is not None
        return prepared.joint

    def _ready(self, module: SharesInput) -> _Prepared | None:
        """The group as it was prepared; None where it cannot be computed together."""
        prepared = self._prepared
        if prepared is not None:
            if prepared.joint is not None:
                if unchanged(prepared.states[id(module)], module.state()):
                    return prepared
            elif all(unchanged(prepared.states[id(one)], one.state()) for one in self._modules):
                return None
            self._prepared = None
        try:
            self.prepare()
        except LayoutError:
            return None
        return self._prepared

    def forget(self) -> None:
        """Prepare again: the modules' tensors were moved or loaded."""
        self._prepared = None
        self._mine.kept = None
        for single in self._alone.values():
            single.forget()


def share_inputs(kernels: Mapping[str, Any]) -> None:
    """Let the kernels of a model that read the same input be computed together, and prepare them.

    Args:
        kernels: module name → kernel; those that cannot share are passed over.

    Raises:
        LayoutError: when a checkpoint's tensors do not belong together.
    """
    ours = {name: kernel for name, kernel in kernels.items() if isinstance(kernel, SharesInput) and kernel.joinable}
    for kernel in ours.values():
        kernel.shared.prepare()
    for parent in {name.rpartition(".")[0] for name in ours}:
        for names in SHARING:
            found = [ours[full] for name in names if (full := f"{parent}.{name}" if parent else name) in ours]
            if len(found) < 2 or len(set(map(type, found))) != 1:
                continue
            shared = SharedInput(found)
            try:
                shared.prepare()
            except LayoutError:
                continue  # of different groups, say: each alone
            for kernel in found:
                kernel.shared = shared
