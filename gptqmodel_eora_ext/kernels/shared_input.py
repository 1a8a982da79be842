"""Modules that read the same input (q, k and v; gate and up), computed together when the first of them is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..formats.packed_weights import LayoutError
from .versions import unchanged, version

# Modules of one parent that read the same input, by the names that decoders of the Llama lineage give them. A model
# that uses the names otherwise only loses the common call (`SharedInput`).
SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

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

    def state(self) -> tuple[Any, ...]:
        """What `join` reads: it is called again when one of these is another object or number."""
        raise NotImplementedError

    @classmethod
    def join(cls, modules: Sequence[Any]) -> Joint:
        """Modules of this class and of one device, ready to be computed together.

        Raises:
            LayoutError: when they cannot be, or a checkpoint's tensors do not belong together.
        """
        raise NotImplementedError


class SharedInput:
    """Modules that read the same input, computed together when the first of them is called.

    What the others will ask for is kept until they do. Should one of them be called with something else first, then
    they do not share their input after all, and each goes alone from then on.

    Compiled by `torch.compile`, a model keeps a GPU's launches as they were prepared, and must not write to an input
    between two modules that read it: tensors do not tell their version while they are traced.

    Args:
        modules: of one class, that `join` takes.
    """

    def __init__(self, modules: Sequence[SharesInput]) -> None:
        self._modules = tuple(modules)
        self._prepared: tuple[tuple[Any, ...], Joint] | None = None
        self._waiting: tuple[torch.Tensor, int, dict[int, torch.Tensor]] | None = None

    def __call__(self, module: SharesInput, x: torch.Tensor) -> torch.Tensor:
        """y of ``module``."""
        written = version(x)
        if self._waiting is not None:
            known, known_written, waiting = self._waiting
            if known is x and known_written == written and id(module) in waiting:
                y = waiting.pop(id(module))
                if not waiting:
                    self._waiting = None
                return y
            self._part()
            return module.shared(module, x)
        try:
            joint = self.prepare()
        except LayoutError:
            if self.alone:
                raise
            self._part()
            return module.shared(module, x)
        ys = dict(zip(map(id, self._modules), joint(x), strict=True))
        y = ys.pop(id(module))
        if ys:
            self._waiting = (x, written, ys)
        return y

    @property
    def alone(self) -> bool:
        """Whether there is one module only."""
        return len(self._modules) == 1

    def prepare(self) -> Joint:
        """What computes the modules together, prepared now unless it is.

        Raises:
            LayoutError: as `SharesInput.join`.
        """
        if self._prepared is not None and torch.compiler.is_compiling():
            return self._prepared[1]
        state = tuple(entry for module in self._modules for entry in module.state())
        if self._prepared is None or not unchanged(self._prepared[0], state):
            self._prepared = (state, self._modules[0].join(self._modules))
        return self._prepared[1]

    def forget(self) -> None:
        """Prepare again: the modules' tensors were moved or loaded."""
        self._prepared = self._waiting = None

    def _part(self) -> None:
        self._waiting = None
        for module in self._modules:
            module.shared = SharedInput([module])


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
