"""One run of compensation: what is asked, what has been found so far, and what is told about it afterwards."""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
import threading
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from ... import __version__
from ...adapter import ModuleFactors, validate_rank
from ...compensate import Recipe
from ...ranks import RankAllocation
from .adapter import EoRA
from .native import NativeInputs

log = logging.getLogger(__name__)


class CompensationRun:
    """State shared by the processors of one `quantize` or `generate` call.

    Args:
        adapter: what the user asked for, settled.
        dynamic: GPTQModel's per-module overrides; `{"adapter": {"rank": …}}` there overrides the rank, 0 for none.
        method: quantisation method, for the record.
        adapter_batches: prepared batches of `adapter_calibration_dataset`; empty when the quantiser's are used.
            They run ahead of the quantiser's in the same forwards.
        rounds: times that a module is quantised, by `rounds_to_make`.

    Raises:
        ValueError: when a rank in `dynamic` is no integer of at least 0.
    """

    def __init__(
        self,
        adapter: EoRA,
        dynamic: Mapping[str, Any] | None,
        *,
        method: str,
        adapter_batches: Sequence[Mapping[str, Any]] = (),
        rounds: int = 1,
    ) -> None:
        assert adapter.rank is not None
        self.rank = adapter.rank
        self.allocation: RankAllocation | None = None
        self.adapter = adapter
        self.objective = adapter.objective
        self.factor_bits = adapter.factor_bits
        self.rounds = rounds
        self.method = method
        self.adapter_batches = list(adapter_batches)
        self.native_inputs: NativeInputs | None = None
        self.factors: dict[str, ModuleFactors] = {}
        self.seconds = 0.0
        self.calibration: dict[str, Any] = {}
        self._ranks = _dynamic_ranks(dynamic)
        self._lock = threading.Lock()

    @property
    def own_data(self) -> bool:
        """Whether the adapter is calibrated on other data than the quantiser."""
        return bool(self.adapter_batches)

    def recipe_for(self, qcfg: Any, full_name: str, *, first: bool = True) -> Recipe:
        """What a module's factors should be: of the rank that `dynamic` names for it, if any, else the adapter's.

        A rank under a budget is chosen in a module's ``first`` round and kept in the others.
        """
        if self.allocation is not None and full_name in self.allocation.options:
            most = self.allocation.options[full_name].ranks[-1]
            choose = functools.partial(self.allocation.choose if first else self.allocation.strongest, full_name)
            return Recipe(most, self.objective, self.factor_bits, choose)
        rank = self.fixed_rank(qcfg, full_name)
        if rank is None:
            rank = self.rank if isinstance(self.rank, int) else 0
        return Recipe(rank, self.objective, self.factor_bits)

    def fixed_rank(self, qcfg: Any, full_name: str) -> int | None:
        """The rank that `dynamic` names for a module, if any."""
        rank = qcfg.dynamic_get(full_name, key="adapter", sub_key="rank", default=None) if self._ranks else None
        return None if rank is None else int(rank)

    def for_quantiser(self, batch: int | None) -> bool:
        """Whether the quantiser's statistics want this batch."""
        return batch is None or batch >= len(self.adapter_batches)

    def for_adapter(self, batch: int | None) -> bool:
        """Whether the adapter's statistics want this batch."""
        return not self.own_data or (batch is not None and batch < len(self.adapter_batches))

    def record(self, full_name: str, factors: ModuleFactors) -> None:
        """Keep a module's factors, on the CPU. Called from worker threads."""
        with self._lock:
            self.factors[full_name] = factors

    def took(self, seconds: float) -> None:
        """Count time spent on factors. Called from worker threads."""
        with self._lock:
            self.seconds += seconds

    def describe_calibration(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Fingerprint the prepared batches, so that an adapter tells what it was made on."""
        digest = hashlib.sha256()
        tokens = 0
        for batch in batches:
            ids = torch.as_tensor(batch["input_ids"])
            digest.update(ids.to(torch.int64).cpu().numpy().tobytes())
            mask = batch.get("attention_mask")
            tokens += int(torch.as_tensor(mask).sum()) if mask is not None else ids.numel()
        self.calibration = {"batches": len(batches), "tokens": tokens, "sha256": digest.hexdigest()}

    def details(self) -> dict[str, Any]:
        """What goes into `eora.json` beside the per-module report."""
        hosts = {name: version(name) for name in ("gptqmodel", "torch", "transformers", "peft")}
        return {
            "objective": self.objective,
            "factor_bits": self.factor_bits,
            "rank": self.rank,
            "rounds": self.rounds,
            **(
                {"allocation": {**self.allocation.report(), "sensitivity": self.adapter.sensitivity}}
                if self.allocation
                else {}
            ),
            "method": self.method,
            "calibration": self.calibration,
            "seconds": round(self.seconds, 3),
            "versions": {"gptqmodel-eora-ext": __version__, "python": platform.python_version(), **hosts},
        }


def check_token_ids(batches: Iterable[Mapping[str, Any]], vocabulary: int) -> None:
    """Refuse calibration of another tokenizer before any layer runs.

    Raises:
        ValueError: when a token id has no embedding, or there is no batch.
    """
    batches = list(batches)
    if not batches:
        raise ValueError(
            "EoRA: the calibration dataset is empty once short samples are left out. Pass texts or token ids "
            "of at least 10 tokens each; 128 samples of 512 tokens are a good start."
        )
    largest = max(int(torch.as_tensor(batch["input_ids"]).max()) for batch in batches)
    if largest >= vocabulary:
        raise ValueError(
            f"EoRA: calibration holds token id {largest}, but the model embeds {vocabulary} ids. The tokenizer does "
            f"not fit the model; tokenize with the model's own."
        )


def rounds_to_make(adapter: EoRA, single_round: str | None) -> int:
    """The rounds of an adapter, where ``single_round`` does not say why there can be only one.

    Raises:
        NotImplementedError: for several rounds, asked for by name, where only one is possible.
    """
    if single_round is None or adapter.rounds == 1:
        return adapter.rounds
    if adapter.asked_rounds:
        raise NotImplementedError(f"EoRA: rounds={adapter.rounds} is not possible: {single_round}. Leave it out.")
    log.info("EoRA: one round where preset %r makes %d: %s.", adapter.preset, adapter.rounds, single_round)
    return 1


def _dynamic_ranks(dynamic: Mapping[str, Any] | None) -> dict[str, int]:
    ranks = {}
    for pattern, override in (dynamic or {}).items():
        options = override.get("adapter") if isinstance(override, Mapping) else None
        if isinstance(options, Mapping) and options.get("rank") is not None:
            what = f"QuantizeConfig: `dynamic[{pattern!r}]['adapter']['rank']`"
            ranks[pattern] = validate_rank(options["rank"], what=what, minimum=0)
    return ranks
