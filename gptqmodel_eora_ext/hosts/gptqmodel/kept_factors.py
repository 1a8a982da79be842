"""In which form an adapter keeps its factors: as they were stored, as the CPU kernels read them, or as plain tensors.

    form        who has it                                   memory
    stored      the adapter, once `attach` gave it factors   as the adapter's file: 16 bits, or packed 8 or 4 bits
    repacked    the adapter and the CPU kernel, which share  the same but for padding; the stored form is given up, and
                it                                           had back bit for bit by whoever asks
    plain       whoever asked for `lora_A` or `lora_B`, or   in_features × rank and rank × out_features, in the dtype
                set them                                     of 16-bit factors, float32 where they were packed

Plain tensors may be written to by whoever has them, so that these writes must be seen: they count from then on. Those
that nobody has any more and nobody wrote to are let go.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ...formats.factors import Factors, QuantizedFactor
from ...kernels.cpu.factors import RepackedFactors, repack_factors, unpack_factors
from ...kernels.versions import counting_writes, unchanged, versions


def _uses(tensor: torch.Tensor) -> int:
    """How many things refer to a tensor's storage, views included; 0 where this torch cannot tell."""
    count = getattr(tensor, "_use_count", None)
    return 0 if count is None else int(count())


def _references(values: Sequence[Any]) -> list[int]:
    """How many refer to each of the values in a list; as many as to new objects in one, if nobody else does."""
    return [sys.getrefcount(value) for value in values]


class _LookedAt(threading.local):
    """The adapter of which a thread was given a plain tensor last."""

    last: weakref.ref[KeepsFactors] | None = None


_looked_at = _LookedAt()


class KeepsFactors:
    """The part of an adapter that keeps Aᵀ and Bᵀ."""

    def __init__(self) -> None:
        self._form: Factors | RepackedFactors | None = None
        self._floats: list[torch.Tensor | None] = [None, None]
        # How often the plain tensors had been written to while they were what the form says; None without a form or
        # without plain tensors.
        self._same_at: tuple[int, ...] | None = None
        # As of `Factors.members`.
        self._members: tuple[int, ...] = ()
        self._device = torch.device("cpu")
        # What was made of the factors for one device, and in one dtype; each beside the state that it was made in.
        self._factors: tuple[tuple[Any, ...], Factors] | None = None
        self._converted: tuple[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def lora_A(self) -> torch.Tensor | None:
        """Aᵀ, in_features × rank; packed factors are unpacked for whoever asks, float32."""
        return self._float(0)

    @lora_A.setter
    def lora_A(self, value: torch.Tensor | None) -> None:
        self._set_float(0, value)

    @property
    def lora_B(self) -> torch.Tensor | None:
        """Bᵀ, rank × out_features, likewise."""
        return self._float(1)

    @lora_B.setter
    def lora_B(self, value: torch.Tensor | None) -> None:
        self._set_float(1, value)

    @property
    def packed(self) -> tuple[QuantizedFactor, QuantizedFactor] | None:
        """A and Bᵀ in integers as they were stored; None where they were not, or were written to since."""
        form = self.form
        if form is None or not form.packed:
            return None
        found = _stored(form)
        assert isinstance(found.down, QuantizedFactor) and isinstance(found.up, QuantizedFactor)
        return found.down, found.up

    @packed.setter
    def packed(self, value: tuple[QuantizedFactor, QuantizedFactor] | None) -> None:
        self._keep(None if value is None else Factors(*value))
        self._same_at = None if value is None or self._floats[0] is None else self._versions()

    @property
    def has_factors(self) -> bool:
        """Whether the module has any; asking for `lora_A` would make a tensor of it."""
        return self._form is not None or all(one is not None for one in self._floats)

    @property
    def trained(self) -> bool:
        """Whether a factor wants a gradient."""
        lora_A, lora_B = self._floats
        return (lora_A is not None and lora_A.requires_grad) or (lora_B is not None and lora_B.requires_grad)

    def stored(self) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
        """Aᵀ, Bᵀ and the form as they lie here: no tensor is made."""
        if self._same_at is not None:
            self._forget_unseen()
        return self._floats[0], self._floats[1], self._form

    def state(self) -> tuple[Any, ...]:
        """What is another object or number once the factors are others or were written to."""
        return (*self.stored(), *self._versions())

    def factors(self, device: torch.device) -> Factors | None:
        """The factors on ``device`` as they were stored, packed if they were so; None without any."""
        if not self.has_factors:
            return None
        state = (*self.state(), device)
        if self._factors is None or not unchanged(self._factors[0], state):
            self._factors = (state, self._as_stored().to(device))
        return self._factors[1]

    def repacked(self) -> RepackedFactors | None:
        """The factors as the CPU kernels read them; None without any.

        The stored form is given up for it, unless it could not be had back.
        """
        if not self.has_factors:
            return None
        form = self.form
        if isinstance(form, RepackedFactors):
            return form
        made = repack_factors(self._as_stored())
        if form is not None and made.complete:
            self._keep(made)
        return made

    def _attach(self, factors: Factors, device: torch.device) -> None:
        """Take factors that nobody else writes to; 16-bit ones are moved to ``device``."""
        self._device, self._members = device, factors.members
        self._floats, self._same_at = [None, None], None
        # Copies, since a tensor that was read from a file may keep all of the file in memory.
        down, up = map(_copied, (factors.down, factors.up))
        copied = replace(factors, down=down, up=up)
        self._keep(copied if factors.packed else copied.to(device))

    def _move(self, device: torch.device) -> None:
        """Have plain tensors, and 16-bit factors that are kept as they were stored, lie on ``device``."""
        self._device = device
        form = self.form
        if any(one is not None and one.device != device for one in self._floats):
            self._floats = [None if one is None else one.to(device) for one in self._floats]
            self._same_at = None if form is None else self._versions()
        self._keep(form.to(device) if isinstance(form, Factors) and not form.packed else form)

    def _keep(self, form: Factors | RepackedFactors | None) -> None:
        if form is not self._form:
            # They hold on to the form before.
            self._factors = self._converted = None
        self._form = form

    @property
    def form(self) -> Factors | RepackedFactors | None:
        """The form, where it tells what the factors are now."""
        return self._form if self._same_at is None or self._same_at == self._versions() else None

    def _versions(self) -> tuple[int, ...]:
        return versions(*self._floats)

    def _float(self, index: int) -> torch.Tensor | None:
        if self._floats[index] is None and self._form is not None:
            with torch.inference_mode(False), torch.no_grad():
                # Tensors of their own and not views, so that views of them are counted as theirs (`_forget_unseen`).
                self._floats = [one.to(self._device, copy=True) for one in self._pair()]
            self._same_at = self._versions()
            # Who goes over a whole model, as the host's loader does, holds one adapter's at a time.
            last = None if _looked_at.last is None else _looked_at.last()
            _looked_at.last = weakref.ref(self)
            if last is not None and last is not self:
                last._forget_unseen()
        return self._floats[index]

    def _pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Aᵀ and Bᵀ to read from, in the layouts that stock `Lora` multiplies with."""
        if self._form is None or self._floats[0] is not None:
            lora_A, lora_B = self._floats
            assert lora_A is not None and lora_B is not None
            return lora_A, lora_B
        form = _stored(self._form)
        down, up = (one.dequantize() if isinstance(one, QuantizedFactor) else one for one in (form.down, form.up))
        return down.T, up

    def _as_stored(self) -> Factors:
        """The factors in the form that they were stored in, or of plain tensors."""
        form = self.form
        if form is not None:
            return _stored(form)
        lora_A, lora_B = self._floats
        assert lora_A is not None and lora_B is not None
        return Factors(lora_A.detach().T, lora_B.detach(), self._members)

    def _forget_unseen(self) -> None:
        """Let go of plain tensors that somebody only looked at."""
        if self._form is None or self.trained or self._versions() != self._same_at:
            return
        # Nobody else can write to it where no other Python object refers to it, and no view does.
        unseen = _references(self._floats) == _references([object(), object()])
        if unseen and all(one is not None and _uses(one) == 1 for one in self._floats):
            self._floats, self._same_at = [None, None], None

    def _set_float(self, index: int, value: torch.Tensor | None) -> None:
        self._float(1 - index)  # the other one stays what it is, also where it is no plain tensor yet
        self._floats[index] = None if value is None else counting_writes(value)
        self._same_at = None
        self._keep(None)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: the factors as they were stored, and nothing that was made of them."""
        form = None if self.trained else self.form
        kept = {
            "_form": None if form is None else _stored(form),
            "_floats": self._floats if form is None else [None, None],
            "_same_at": None,
        }
        return {**self.__dict__, **kept, "_factors": None, "_converted": None}


def _copied(factor: torch.Tensor | QuantizedFactor) -> torch.Tensor | QuantizedFactor:
    if isinstance(factor, QuantizedFactor):
        return replace(factor, codes=factor.codes.clone(), scales=factor.scales.clone())
    return factor.clone(memory_format=torch.contiguous_format)


def _stored(form: Factors | RepackedFactors) -> Factors:
    return unpack_factors(form) if isinstance(form, RepackedFactors) else form
