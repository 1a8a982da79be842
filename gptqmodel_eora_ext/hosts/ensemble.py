"""Serving an ensemble: each prompt's weights are chosen while it is computed, and stay with its cache.

The first layers have no members (`EnsembleFolder.depth`), so what they compute hangs on no weights. What the last
linear module of each reads is noted, and before the layer that follows the router chooses the weights from there on: no
token is computed twice, and the first token that is generated is computed with the prompt's own weights already.

The rule for caches of keys and values: they belong to the weights that they were computed with. A call that continues
a cache continues its weights, whatever its text is about. A call without a cache, or with an empty one, is a prompt,
and is routed. Whoever wants a conversation routed anew gives up its cache (`Conversation` does, where the weights
would change by more than `MOST_CHANGE`).
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..adapter.ensemble.folder import EnsembleFolder
from ..adapter.ensemble.pooling import pooled
from ..adapter.ensemble.router import Router, Routing
from ..adapter.ensemble.told import Told, told_weights
from ..adapter.errors import AdapterError
from ..adapter.layers import layer_number
from ..adapter.naming import named_folder, read_entry
from ..formats.names import MODEL_CONFIG
from ..kernels.row_weights import Mixture, RowWeights

ATTRIBUTE = "eora_ensemble"
# Half the sum of changes of weights from which on a turn of a conversation is worth computing it anew.
MOST_CHANGE = 0.5
# What transformers calls a cache, now and before.
CACHES = ("cache", "past_key_values")


class _Seen(Exception):
    """Ends a forward that was made only for what the first layers compute."""


@dataclass
class _Pending:
    """A prompt whose weights are not chosen yet."""

    mask: torch.Tensor | None
    told: list[list[float] | None]
    cache: Any


class _OfThread(threading.local):
    """What one thread's call is about."""

    told: Told | Sequence[Told] = None
    pending: _Pending | None = None
    # What a call without generation is made for, given what the early layers have shown: a tensor of each.
    look: Callable[[Sequence[torch.Tensor]], None] | None = None
    seen: Sequence[torch.Tensor] = ()
    routing: Routing | None = None
    ids: torch.Tensor | None = None
    weights: RowWeights | None = None


class Ensemble:
    """The ensemble of a loaded model. `ensemble_of` finds it.

    Args:
        model: transformers' causal language model, whose kernels read ``mixture``.
        layers: the model's layers.
        mixture: what the kernels' weights come from.
        folder: the ensemble.
        router: chooses; None where it is not made yet, and every weight has to be told.

    Attributes:
        observers: called with the routing of every prompt, and its token ids where the call had them.

    Example:
        >>> model = GPTQModel.load("out")
        >>> model.generate(["2 + 2 =", "def main():"])  # each row by its own weights
        >>> ensemble = ensemble_of(model)
        >>> ensemble.last.nearest
        ('math', 'code')
        >>> with ensemble.told({"math": 1.0}):
        ...     model.generate(["2 + 2 ="])
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Sequence[torch.nn.Module],
        mixture: Mixture,
        folder: EnsembleFolder,
        router: Router | None,
    ) -> None:
        self.folder, self.router, self.mixture = folder, router, mixture
        self.members = folder.names[1:]
        self._begin_serving(model)
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for name in router.reads if router is not None else ():
            model.get_submodule(name).register_forward_pre_hook(self._note)
        layers[folder.depth].register_forward_pre_hook(self._look, with_kwargs=True)
        model.register_forward_hook(self._end, with_kwargs=True, always_call=True)

    def _begin_serving(self, model: torch.nn.Module) -> None:
        """Have what belongs to one model in one process: nothing was routed, no cache is known, nobody watches."""
        self.observers: list[Callable[[Routing, torch.Tensor | None], None]] = []
        # The model's hooks hold the ensemble; a strong reference back would keep the model in memory for longer.
        self._model = weakref.ref(model)
        self._mine = _OfThread()
        self._of_cache: weakref.WeakKeyDictionary[Any, RowWeights] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle of the model holds: the model, which is the copy then, and what routes its prompts.

        Its hooks are copied with the model. Observers and weights of caches stay with the original.
        """
        kept = {name: getattr(self, name) for name in ("folder", "router", "mixture", "members")}
        return {**kept, "model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state.pop("model")
        self.__dict__.update(state)
        self._begin_serving(model)

    @property
    def last(self) -> Routing | None:
        """How this thread's last prompts were routed; weights that were told are among them."""
        return self._mine.routing

    @contextlib.contextmanager
    def told(self, weights: Told | Sequence[Told]) -> Iterator[None]:
        """Have prompts of this thread within the block weighed so in place of routing them.

        Args:
            weights: member → weight for all rows, or a list with one such for each; None routes a row, {} gives it the
                shared adapter alone.

        Raises:
            AdapterError: for another form, an unknown member, and weights that are negative, NaN or sum to above 1.
        """
        # Checked now: within a forward, the error would come after work.
        rows = len(weights) if isinstance(weights, Sequence) else 1
        told_weights(weights, self.members, rows)
        before, self._mine.told = self._mine.told, weights
        try:
            yield
        finally:
            self._mine.told = before

    def route(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Routing:
        """How prompts would be routed. Computes the first layers alone.

        Args:
            input_ids: prompts × tokens.
            attention_mask: prompts × tokens, non-zero for real tokens.

        Raises:
            AdapterError: for an ensemble without a router.
        """
        found: list[Routing] = []
        self._see(input_ids, attention_mask, lambda seen: found.append(self._routing(seen, attention_mask)))
        return found[0]

    def weights_of(self, cache: Any) -> torch.Tensor | None:
        """The weights that a cache was computed with, sequences × members; None for one that no prompt here filled."""
        known = self._of_cache.get(cache)
        return None if known is None else known.weights[:, 1:]

    # Hooks ---------------------------------------------------------------------------------------------------------

    def _see(
        self, ids: torch.Tensor, mask: torch.Tensor | None, look: Callable[[Sequence[torch.Tensor]], None]
    ) -> None:
        model = self._model()
        assert model is not None
        self._mine.look = look
        try:
            with torch.inference_mode(), contextlib.suppress(_Seen):
                model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            self._mine.look = self._mine.pending = None

    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            raise NotImplementedError("EoRA: an ensemble's weights change from call to call, so that it cannot be "
                                      "compiled. Load one adapter for that.")  # fmt: skip
        mine = self._mine
        mine.pending, mine.weights, mine.seen = None, None, ()
        self.mixture.set(None)
        if mine.look is not None:
            return
        cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        if given is None:
            raise ValueError(
                "EoRA: an ensemble needs to see the prompt: call the model with input_ids or inputs_embeds."
            )
        sequences = int(given.shape[0])
        if cache is not None and int(cache.get_seq_length()) > 0:
            known = self._of_cache.get(cache)
            if known is None:
                raise AdapterError(
                    "Ensemble: a cache is continued whose weights are not known, since its prompt was not computed by "
                    "this model, or the cache is a copy. Give the whole prompt without a cache."
                )
            self._use(known, cache)
            return
        mask = kwargs.get("attention_mask")
        told = self._told(sequences)
        mine.pending = _Pending(mask if torch.is_tensor(mask) and mask.ndim == 2 else None, told, cache)
        mine.ids = given if given.ndim == 2 else None

    def _told(self, sequences: int) -> list[list[float] | None]:
        """Rows of weights; of a search by several beams, each prompt's for all of its beams."""
        told = self._mine.told
        if told is None or isinstance(told, Mapping):
            return told_weights(told, self.members, sequences)
        beams = sequences // len(told) if len(told) and sequences % len(told) == 0 else 1
        rows = told_weights(told, self.members, sequences // beams)
        return [row for row in rows for _ in range(beams)]

    def _note(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if self._mine.look is not None or self._mine.pending is not None:
            self._mine.seen = (*self._mine.seen, args[0])

    def _look(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mine = self._mine
        hidden = args[0] if args else kwargs["hidden_states"]
        # Some models give their linear modules the tokens of all prompts in one row.
        seen, mine.seen = [one.reshape(*hidden.shape[:2], -1) for one in mine.seen], ()
        if mine.look is not None:
            mine.look(seen)
            raise _Seen
        pending = mine.pending
        if pending is None:
            return
        mine.pending = None
        mask = pending.mask
        if mask is not None and mask.shape[1] != hidden.shape[1]:
            mask = mask[:, -hidden.shape[1] :]
        routing = self._routing(seen, mask) if None in pending.told else self._nothing_routed(len(pending.told))
        rows = routing.weights.clone()
        for row, told in enumerate(pending.told):
            if told is not None:
                rows[row] = torch.tensor(told)
        routing = replace(routing, weights=rows)
        mine.routing = routing
        with torch.inference_mode(False):
            weights = RowWeights(torch.cat([torch.ones(len(rows), 1), rows.to("cpu", copy=True)], dim=1))
        self._use(weights, pending.cache)
        for observe in self.observers:
            observe(routing, mine.ids)

    def _routing(self, seen: Sequence[torch.Tensor], mask: torch.Tensor | None) -> Routing:
        if self.router is None:
            raise AdapterError(f"Ensemble: `{self.folder.path}` has no router; tell the weights: weights={{…}}.")
        start = time.perf_counter()
        means, tokens = pooled(seen, mask)
        routing = self.router.choose(means.cpu(), tokens.cpu())
        return replace(routing, seconds=time.perf_counter() - start)

    def _nothing_routed(self, rows: int) -> Routing:
        classes = 0 if self.router is None else len(self.router.classes)
        empty = torch.zeros(rows, len(self.members))
        return Routing(empty, ("",) * rows, torch.zeros(rows, classes), (1.0,) * rows, (False,) * rows)

    def _use(self, weights: RowWeights, cache: Any) -> None:
        self._mine.weights = weights
        self.mixture.set(weights)
        if cache is not None:
            self._of_cache[cache] = weights

    def _end(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        weights, self._mine.weights, self._mine.pending = self._mine.weights, None, None
        self.mixture.set(None)
        made = next((one for name in CACHES if (one := getattr(output, name, None)) is not None), None)
        if weights is not None and made is not None:
            self._of_cache[made] = weights


def readers(model: torch.nn.Module, names: Collection[str], depth: int) -> list[str]:
    """The modules whose inputs a router reads: of each early layer the last of those named, in the MLP of most models.

    Args:
        model: that they are of.
        names: of the quantised linear modules.
        depth: early layers.

    Raises:
        AdapterError: for a layer without any.
    """
    last = {layer_number(name): name for name, _ in model.named_modules() if name in names}
    missing = [layer for layer in range(depth) if layer not in last]
    if missing:
        raise AdapterError(f"Ensemble: layer {missing[0]} has no quantised linear module, which the router would read. "
                           f"Choose a smaller --depth, or quantise it.")  # fmt: skip
    return [last[layer] for layer in range(depth)]


def early_inputs(
    model: torch.nn.Module, reads: Sequence[str], layer: torch.nn.Module, input_ids: torch.Tensor
) -> list[torch.Tensor]:
    """What modules read, prompts × tokens × features each, of prompts without padding; ``layer`` and later ones are not
    computed."""
    found: dict[str, torch.Tensor] = {}

    def note(name: str, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        found[name] = args[0].detach().reshape(*input_ids.shape, -1)

    def end(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        raise _Seen

    hooks = [model.get_submodule(name).register_forward_pre_hook(functools.partial(note, name)) for name in reads]
    hooks.append(layer.register_forward_pre_hook(end))
    try:
        with torch.inference_mode(), contextlib.suppress(_Seen):
            model(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[name] for name in reads]


def ensemble_of(model: Any) -> Ensemble:
    """The ensemble that a model was loaded with.

    Args:
        model: of `GPTQModel.load`, or transformers' inside it.

    Raises:
        AdapterError: for a model without one.
    """
    found = getattr(model, ATTRIBUTE, None)
    if not isinstance(found, Ensemble):
        raise AdapterError("Ensemble: this model was loaded without one. Load a checkpoint that names an ensemble, or "
                           "GPTQModel.load(path, adapter=EoRA(path=ENSEMBLE)).")  # fmt: skip
    return found


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Half the sum of the changes of one row of weights, the shared adapter's own share among them: 0 to 1."""
    rest = float((1 - before.sum()) - (1 - after.sum()))
    return (float((before - after).abs().sum()) + abs(rest)) / 2


def is_alone(path: Path) -> bool:
    """Whether a path is an ensemble's folder, and not a checkpoint's."""
    return not (path / MODEL_CONFIG).is_file() and EnsembleFolder.is_one(path)


def checkpoint_of(path: Path) -> tuple[Path, Path | None]:
    """The checkpoint that a path is about, and the ensemble to load it with; None for the one that it names itself.

    Args:
        path: a checkpoint, or an ensemble's folder, which lies in its checkpoint or names where that is.

    Raises:
        AdapterError: for a path that is neither, a checkpoint that names no ensemble, or an ensemble whose checkpoint
            is not here.
    """
    if (path / MODEL_CONFIG).is_file():
        # Told now: a large model takes minutes to load.
        entry = read_entry(path)
        if entry is None or not EnsembleFolder.is_one(named_folder(path, entry)):
            raise AdapterError(f"Ensemble: `{path}` names no ensemble. Name the ensemble's folder, or make one with "
                               f"`eora ensemble make`.")  # fmt: skip
        return path, None
    ensemble = EnsembleFolder.open(path)
    named = ensemble.shared.settings.base_model
    places = (path.resolve().parent, *([] if named is None else [Path(named)]))
    here = [one for one in places if (one / MODEL_CONFIG).is_file()]
    # A folder above may be another model's: the one that the members were made for is taken before it.
    found = next((one for one in here if ensemble.is_for(one)), None)
    if found is None:
        looked = " and ".join(f"`{one}`" for one in places)
        raise AdapterError(f"Ensemble: the checkpoint that `{path}` was made for is not in {looked}. Put the ensemble "
                           f"into it, or load it by its own name: "
                           f"GPTQModel.load(CHECKPOINT, adapter=EoRA(path={str(path)!r})).")  # fmt: skip
    return found, path
