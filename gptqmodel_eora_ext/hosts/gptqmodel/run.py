"""One run of compensation in GPTQModel's loop: whose batches are whose, ranks by `dynamic`, and the rounds."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...adapter.compensate import Recipe
from ...adapter.validate import validate_rank
from ...calibration.token_ids import require_token_ids
from ...formats.sparsity import Pattern
from ...loop.resume import Keeping
from ...loop.run import Run
from ...system.distributed import current
from ...system.group import Group
from .adapter import EoRA
from .full_precision_inputs import FullPrecisionInputs

log = logging.getLogger(__name__)


class CompensationRun(Run):
    """State shared by the processors of one `quantize` or `generate` call.

    Args:
        adapter: what the user asked for; presets and defaults have been filled in.
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
        super().__init__(adapter.options)
        self.rounds = rounds
        # The processes that share the run; None for one by itself.
        self.group: Group | None = current()
        self.refine = adapter.refine
        self.method = method
        self.adapter_batches = list(adapter_batches)
        self.full_precision_inputs: FullPrecisionInputs | None = None
        # Of zeros, where GPTQ is to prune as it quantises.
        self.pattern: Pattern | None = None
        # What `EoRA(refine=…)` trains on, and what came of it once it has.
        self.refine_windows: list[dict[str, list[int]]] = []
        self.refinement: Mapping[str, Any] | None = None
        # Where finished layers are kept, and by what a run that goes on with them is recognised.
        self.keeping: Keeping | None = None
        self.asked: Mapping[str, Any] = {}
        self.quantizer_calibration: Mapping[str, Any] = {}
        # Tells one checkpoint from another, where the weights are known beforehand.
        self.source = ""
        # Module's name → what it shares a rank in with others, in the file that the factors are for.
        self.together: Callable[[str], str | None] = lambda name: None
        self._ranks = _dynamic_ranks(dynamic)

    @property
    def own_data(self) -> bool:
        """Whether the adapter is calibrated on other data than the quantiser."""
        return bool(self.adapter_batches)

    def recipe_for(self, qcfg: Any, full_name: str, *, first: bool = True) -> Recipe:
        """What a module's factors should be: of the rank that `dynamic` names for it, if any, else the adapter's."""
        return self.recipe(full_name, self.fixed_rank(qcfg, full_name), first=first)

    def fixed_rank(self, qcfg: Any, full_name: str) -> int | None:
        """The rank that `dynamic` names for a module; None where it names none."""
        rank = qcfg.dynamic_get(full_name, key="adapter", sub_key="rank", default=None) if self._ranks else None
        return None if rank is None else int(rank)

    def for_quantiser(self, batch: int | None) -> bool:
        """Whether the quantiser's statistics want this batch."""
        return batch is None or batch >= len(self.adapter_batches)

    def for_adapter(self, batch: int | None) -> bool:
        """Whether the adapter's statistics want this batch."""
        return not self.own_data or (batch is not None and batch < len(self.adapter_batches))

    def details(self) -> dict[str, Any]:
        """What goes into `eora.json` beside the per-module report."""
        refinement = {} if self.refinement is None else {"refinement": self.refinement}
        return self.describe(self.method, "gptqmodel", rounds=self.rounds, **refinement)


def check_token_ids(batches: Iterable[Mapping[str, Any]], vocabulary: int) -> None:
    """Refuse calibration data of another tokenizer before any layer runs.

    Args:
        batches: `input_ids`, windows × tokens each.
        vocabulary: number of ids that the model embeds.

    Raises:
        ValueError: when a token id has no embedding.
    """
    for batch in batches:
        require_token_ids(torch.as_tensor(batch["input_ids"]), vocabulary)


@contextlib.contextmanager
def batches_required(model: Any) -> Iterator[None]:
    """Within the block, refuse calibration data of which GPTQModel keeps nothing; it would divide by zero later.

    Args:
        model: GPTQModel's model object.

    Raises:
        ValueError: from `model.prepare_dataset`, where it returns no batch.
    """
    prepare = model.prepare_dataset

    def checked(*args: Any, **kwargs: Any) -> Any:
        batches = prepare(*args, **kwargs)
        if not batches:
            raise ValueError(
                "EoRA: the calibration dataset is empty once short samples are left out. Pass texts or token ids "
                "of more than 10 tokens each; 128 samples of 512 tokens are a good start."
            )
        return batches

    # An attribute of the instance hides the method until it is deleted.
    model.prepare_dataset = checked
    try:
        yield
    finally:
        del model.prepare_dataset


def calibrated_by(model: Any, windows: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
    """What a `LoopProcessor` is told of the calibration data: windows of token ids, taken as they are.

    Args:
        model: GPTQModel's model object.
        windows: `input_ids` and `attention_mask` of each.
        batch_size: windows per forward.
    """
    return {
        "tokenizer": model.tokenizer,
        "qcfg": model.quantize_config,
        "calibration": list(windows),
        "prepare_dataset_func": model.prepare_dataset,
        "calibration_concat_size": None,
        "calibration_sort": None,
        "calibration_concat_separator": None,
        "batch_size": batch_size,
    }


def rounds_to_make(adapter: EoRA, single_round: str | None) -> int:
    """The number of rounds to make.

    Args:
        adapter: what was asked for.
        single_round: why there can be only one round, for the message; None where there can be several.

    Raises:
        NotImplementedError: for several rounds, asked for by name, where only one is possible.
    """
    if single_round is None or adapter.rounds == 1:
        return adapter.rounds
    if adapter.options.asked_rounds:
        raise NotImplementedError(f"EoRA: rounds={adapter.rounds} is not possible: {single_round}. Leave it out.")
    log.info("EoRA: one round where preset %r makes %d: %s.", adapter.preset, adapter.rounds, single_round)
    return 1


def _dynamic_ranks(dynamic: Mapping[str, Any] | None) -> dict[str, int]:
    """Pattern → rank, of the entries of `dynamic` that name a rank; each is checked."""
    ranks = {}
    for pattern, override in (dynamic or {}).items():
        options = override.get("adapter") if isinstance(override, Mapping) else None
        if isinstance(options, Mapping) and options.get("rank") is not None:
            what = f"QuantizeConfig: `dynamic[{pattern!r}]['adapter']['rank']`"
            ranks[pattern] = validate_rank(options["rank"], what=what, minimum=0)
    return ranks
