"""Forecasts of all modules in one sweep through the model, a layer at a time.

While a layer's weights are in memory, the inputs of its modules are gathered on the calibration data, the weights are
rounded as the quantiser will round them, and the loss by that error is forecast.

What all modules of a kind (`q_proj`, …) lose together is measured in the same sweep: for each kind, some other tokens
go through the layers with the weights of that kind alone replaced by Ŵ + BA, and the scores at the end are compared
with those of the full-precision model. Forecasts need that correction for two reasons. They are made on some thousand
tokens, to which the quantiser and the factors fit themselves; other tokens lose more, the more so the wider the input:
1.1 times the forecast for SmolLM2's `k_proj`, 2.4 times for its `down_proj`. And a forecast takes the errors of
different tokens to be independent, but those that all keys of a window share cancel in the softmax, and others add up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from ..adapter.layers import solving_cost
from ..solve import ColumnOrder, Grid, Moment, column_order, error_loss, gptq
from ..system.distributed import current, deal, share
from ..system.memory import release_free_memory
from ..system.side_by_side import side_by_side
from .forecast import Forecast, ModuleMoments, unreached, with_components
from .gradients import Progress
from .kinds import Kinds
from .layered import LayeredModel, Window
from .ranks import TokenCorrection
from .rows import InputRows, moment_of
from .sensitivity import Sensitivity

log = logging.getLogger(__name__)

# In place of 0 where something is divided by it.
TINY = 1e-30
# A layer with a module of more weights has its modules worked on one after the other: each keeps all processors busy,
# and takes some ten times the memory of its weights in float32.
LARGE = 1 << 22
# Modules that fewer tokens reach are told in the log: at 4 tokens a component, so many allow rank 64 at most.
FEW_TOKENS = 256


@dataclass(frozen=True)
class Rounding:
    """How a host will round one module's weights.

    Attributes:
        bits: widths of the weights to forecast, at least one.
        grid: group size, symmetry, and the search for scales.
        spreads: whether rounding errors are spread over later columns, as GPTQ does.
    """

    bits: tuple[int, ...]
    grid: Grid
    spreads: bool = True


@dataclass(frozen=True)
class Question:
    """What a sweep is to forecast.

    Attributes:
        rounding: module's name → how its weights will be rounded.
        rank: module's name and a width → number of components to forecast.
        quantized: module's name, W and C → Ŵ, out × in, for a finished checkpoint or weights that are pruned; None to
            find Ŵ by a quick GPTQ.
        uniform: rank of the factors with which all modules of a kind are measured together.
        weighed: whether inputs are weighed by their tokens' gradients (`ranks.TokenCorrection`); without, the two are
            taken to be independent.
        candidates: module's name and W → each Ŵ to compare, one for each of its widths, which are then no bits but
            numbers of candidates; for a quantiser whose own files are compared. None otherwise.
        source: what tells one ``quantized`` from another (a digest of a checkpoint), so that an interrupted sweep can
            be gone on with; empty where there is none.
    """

    rounding: Callable[[str], Rounding]
    rank: Callable[[str, int], int]
    quantized: Callable[[str, torch.Tensor, Moment], torch.Tensor] | None = None
    uniform: int = 0
    weighed: bool = True
    candidates: Callable[[str, torch.Tensor], Iterable[torch.Tensor]] | None = None
    source: str = ""

    @property
    def rounds(self) -> bool:
        """Whether Ŵ has to be found by a quick GPTQ."""
        return self.quantized is None and self.candidates is None


@dataclass(frozen=True)
class Swept:
    """What a sweep found.

    Attributes:
        forecasts: full module name → width → forecast.
        divergences: kind of module → nats a token that all its modules cost together, each at its first width with
            factors of the rank `Question.uniform`. Empty where kinds were not asked for.
        output_moments: full module name → G that the forecasts were made with. Modules that no token reached are not in
            it.
        tokens: number of tokens that forecasts were made on.
        reached: full module name → how many of them reached it: all, except for experts.
    """

    forecasts: Mapping[str, Mapping[int, Forecast]]
    divergences: Mapping[str, float]
    output_moments: Mapping[str, Moment]
    tokens: int = 0
    reached: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweeping:
    """A sweep under way; what it has found so far is added to.

    Attributes:
        forecasts: as in `Swept`, like the next two.
        relative: output moments, where they do not come from gradients.
        reached: see there.
        windows: on their way through the layers.
        kinds: measured beside; None where they are not.
    """

    forecasts: dict[str, dict[int, Forecast]]
    relative: dict[str, torch.Tensor]
    reached: dict[str, int]
    windows: Sequence[Window]
    kinds: Kinds | None


class SweepKeeper(Protocol):
    """Keeps a sweep's layers, so that an interrupted one is gone on with (`plan.kept_sweep`)."""

    def go_on(self, under_way: Sweeping) -> int:
        """Fill in what an interrupted sweep has found, and return the first layer that it has not finished."""
        ...

    def keep(self, index: int, names: Sequence[str], under_way: Sweeping) -> None:
        """Keep a layer, whose modules are ``names``, and what the next one starts from."""
        ...


@dataclass(frozen=True)
class LayerInputs:
    """A layer whose weights are in memory, and what its modules read.

    Attributes:
        index: of the layer.
        linears: its modules by full name.
        leaders: module → the one under whose name their common input is kept. Modules that no token reached are not in
            it.
        rows: leader → inputs, tokens × in, in the dtype that the model computed them in.
    """

    index: int
    linears: Mapping[str, torch.nn.Linear]
    leaders: Mapping[str, str]
    rows: Mapping[str, torch.Tensor]


def layer_inputs(
    model: LayeredModel, modules: Sequence[str], windows: Sequence[Window], progress: Progress = iter, first: int = 0
) -> Iterator[LayerInputs]:
    """Run windows through the model, and yield each layer in turn with what its modules read.

    Args:
        model: run layer by layer.
        modules: full names of linear layers.
        windows: as `LayeredModel.begin` returns them. Once a layer is yielded, their `hidden` is its output.
        progress: wraps the layers.
        first: the layer to begin with, whose input is the windows' `hidden`.
    """
    for index in progress(range(first, len(model))):
        with model.layer(index) as layer:
            linears: dict[str, Any] = {
                name: model.model.get_submodule(name) for name in modules if name.startswith(f"{model.layers[index]}.")
            }
            with InputRows(model.layers[index], layer, linears) as watch, torch.no_grad():
                for window in windows:
                    watch.begin(window.keep)
                    window.hidden = model.run(layer, index, window.hidden, window)
            rows = {leader: watch.rows(leader) for leader in set(watch.leaders.values())}
            leaders = watch.leaders
            if (group := current()) is not None:
                leaders = {name: leader for told in group.gather(leaders) for name, leader in told.items()}
                rows = group.joined_rows(rows)
            yield LayerInputs(index, linears, leaders, rows)
            del rows, watch
        release_free_memory()


def sweep(
    model: LayeredModel,
    modules: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    sensitivity: Sensitivity | None,
    question: Question,
    *,
    kind_batches: Sequence[Mapping[str, Any]] = (),
    progress: Progress = iter,
    keeper: SweepKeeper | None = None,
) -> Swept:
    """Forecast every module, and measure every kind.

    In memory at a time: one layer's weights, the inputs of its modules, and what forecasting them takes (`LARGE`).

    Args:
        model: run layer by layer, at full precision.
        modules: full names of linear layers.
        batches: data to measure C on: `input_ids` (and `attention_mask`), windows × tokens each. Gradients were taken
            of the first of them.
        sensitivity: G by gradients; None to compare modules by their share of the output, G = I / E‖W x‖².
        question: what to forecast.
        kind_batches: data to measure kinds on, in the same form; none for no measurement.
        progress: wraps the layers.
        keeper: keeps every layer once it is forecast, and knows those that an interrupted sweep has finished.

    Raises:
        ValueError: for NaN or infinity in inputs.
        NotImplementedError: for a model that cannot be run layer by layer.
    """
    group = current()
    mine = range(len(batches)) if group is None else share(len(batches), group.size, group.rank)
    windows = model.begin(batches[mine.start : mine.stop])
    loads = [0.0] * (1 if group is None else group.size)
    kinds = Kinds(model, modules, kind_batches) if kind_batches else None
    forecasts: dict[str, dict[int, Forecast]] = {}
    relative: dict[str, torch.Tensor] = {}
    tokens = sum(int(window.keep.sum()) for window in windows)
    if group is not None:
        group.at("forecasting")
        tokens = sum(group.gather(tokens))
    counts: dict[str, int] = {}
    under_way = Sweeping(forecasts, relative, counts, windows, kinds)
    first = keeper.go_on(under_way) if keeper is not None else 0
    for inputs in layer_inputs(model, modules, windows, progress, first):
        reached = [name for name in inputs.leaders if sensitivity is None or name in sensitivity]
        counts |= {name: len(inputs.rows[leader]) for name, leader in inputs.leaders.items()}
        _tell_routing(inputs, reached, tokens)
        replaced: dict[str, torch.Tensor] = {}
        for one in _of_layer(inputs, reached, tokens, sensitivity, question, model.device, loads):
            forecasts[one.name] = one.forecasts
            if kinds is not None:
                replaced[one.name] = one.compensated
            if one.output_moment is not None:
                relative[one.name] = one.output_moment
        for name in inputs.linears:
            forecasts.setdefault(name, {bits: unreached(question.rank(name, bits))
                                        for bits in question.rounding(name).bits})  # fmt: skip
        if kinds is not None:
            kinds.step(inputs.index, inputs.linears, replaced)
        if keeper is not None:
            keeper.keep(inputs.index, list(inputs.linears), under_way)
        # These names would keep the layer's tensors until the next layer is made, and both would be in memory.
        del inputs, replaced
    output_moments = relative if sensitivity is None else sensitivity
    return Swept(forecasts, kinds.divergences() if kinds else {}, output_moments, tokens, counts)


@dataclass(frozen=True)
class _Found:
    """What was found of a module.

    Attributes:
        name: full module name.
        forecasts: width → forecast.
        compensated: Ŵ + BA at the first width, out × in, in the weight's dtype.
        output_moment: G where it is a diagonal that compares modules; None where it is the sensitivity's.
    """

    name: str
    forecasts: dict[int, Forecast]
    compensated: torch.Tensor
    output_moment: torch.Tensor | None

    def parts(self) -> tuple[list[Any], dict[str, torch.Tensor]]:
        """What can be told in JSON, and tensors, from which `joined` makes the same."""
        told = [[bits, one.total, one.correction.head, one.correction.tail] for bits, one in self.forecasts.items()]
        tensors = {f"gains {bits}": one.gains for bits, one in self.forecasts.items()}
        tensors["compensated"] = self.compensated
        return told, tensors if self.output_moment is None else tensors | {"output moment": self.output_moment}

    @classmethod
    def joined(cls, name: str, told: list[Any], tensors: Mapping[str, torch.Tensor], device: torch.device) -> _Found:
        """What `parts` has taken apart in another process."""
        forecasts = {
            bits: Forecast(total, tensors[f"gains {bits}"], TokenCorrection(head, tail))
            for bits, total, head, tail in told
        }
        moment = tensors.get("output moment")
        return cls(
            name, forecasts, tensors["compensated"].to(device), None if moment is None else moment.to(device)
        )


def _of_layer(
    inputs: LayerInputs,
    reached: Sequence[str],
    tokens: int,
    sensitivity: Sensitivity | None,
    question: Question,
    device: torch.device,
    loads: list[float],
) -> list[_Found]:
    """Forecast the modules of a layer that tokens have reached. Several processes deal them out, and all get all.

    Args:
        loads: what each process was dealt so far; what it is dealt here is added.
    """
    group = current()
    if group is None:
        return _worked_out(inputs, reached, tokens, sensitivity, question, device)
    costs = [solving_cost(*inputs.linears[name].weight.shape) for name in reached]
    owners = dict(zip(reached, deal(costs, loads), strict=True))
    mine = [name for name in reached if owners[name] == group.rank]
    made = {one.name: one.parts() for one in _worked_out(inputs, mine, tokens, sensitivity, question, device)}
    return [_Found.joined(*one, device) for one in group.spread(owners, made)]


def _worked_out(
    inputs: LayerInputs,
    names: Sequence[str],
    tokens: int,
    sensitivity: Sensitivity | None,
    question: Question,
    device: torch.device,
) -> list[_Found]:
    """Forecast some modules of a layer."""
    # Of what is freed glibc keeps holes, into which the next matrices may not fit.
    release_free_memory()
    leaders = {inputs.leaders[name] for name in names}
    moments = {leader: moment_of(rows, leader) for leader, rows in inputs.rows.items() if leader in leaders}
    columns = _columns(inputs, names, moments, question)

    def found(name: str) -> _Found:
        weight = inputs.linears[name].weight.detach()
        wide = weight.to(torch.float32)
        leader, how = inputs.leaders[name], question.rounding(name)
        known = module_moments(name, wide, moments[leader], inputs.rows[leader], tokens, sensitivity)
        if not question.weighed:
            known = replace(known, weighted=None)
        if question.candidates is not None:
            rounded: Iterable[torch.Tensor] = question.candidates(name, weight)
        elif question.quantized is not None:
            rounded = [question.quantized(name, weight, moments[leader]).to(torch.float32)]
        else:
            rounded = gptq(wide, columns[_column_key(leader, how)], how.bits, how.grid)
        forecasts: dict[int, Forecast] = {}
        compensated: list[torch.Tensor] = []
        for bits, approximation in zip(how.bits, rounded, strict=True):
            rank = question.rank(name, bits)
            few = min(rank, question.uniform)
            forecasts[bits], lora_A, lora_B = with_components(wide - approximation, known, rank, few)
            if not compensated:
                compensated.append(torch.addmm(approximation, lora_B, lora_A).to(weight.dtype))
        moment = known.output if sensitivity is None and isinstance(known.output, torch.Tensor) else None
        return _Found(name, forecasts, compensated[0], moment)

    largest = max((one.weight.numel() for one in inputs.linears.values()), default=0)
    if largest <= LARGE:
        return list(side_by_side(found, names, device))
    every = []
    for name in names:
        every.append(found(name))
        release_free_memory()
    return every


def _tell_routing(inputs: LayerInputs, reached: Sequence[str], tokens: int) -> None:
    """Warn, once a layer, about experts that few tokens or none have reached: their ranks are small, or 0."""
    few = [name for name in reached if len(inputs.rows[inputs.leaders[name]]) < min(FEW_TOKENS, tokens)]
    none = [name for name in inputs.linears if name not in inputs.leaders]
    if few or none:
        log.warning(
            "EoRA: layer %d: of %d modules %d were reached by fewer than %d of %d calibration tokens and get small "
            "ranks, and %d by none and get no adapter, for instance %s.", inputs.index, len(inputs.linears), len(few),
            FEW_TOKENS, tokens, len(none), min(none or few),
        )  # fmt: skip


def module_moments(
    name: str, weight: torch.Tensor, inputs: Moment, rows: torch.Tensor, tokens: int, sensitivity: Sensitivity | None
) -> ModuleMoments:
    """The second moments that a module's forecast is computed from.

    Args:
        name: full module name.
        weight: W, out × in, float32.
        inputs: C, in × in, of ``rows``.
        rows: inputs of the tokens that reached the module, tokens × in.
        tokens: number of all tokens, those included that were routed past it.
        sensitivity: G by gradients; None for G = I / E‖W x‖², times the share of tokens that reached the module.
    """
    if sensitivity is None:
        signal = 2 * error_loss(weight, inputs, torch.ones(len(weight), device=weight.device))
        share = len(rows) / max(tokens, 1)
        return ModuleMoments(inputs, torch.full((len(weight),), share / max(signal, TINY), device=weight.device))
    squares = sensitivity.squares(name).to(weight.device)
    # Gradients were taken of the first tokens only.
    weighted = rows[: len(squares)] * squares.sqrt()[:, None]
    output = sensitivity[name].to(weight.device)
    return ModuleMoments(inputs, output, moment_of(weighted, name, max(float(squares.sum()), TINY)))


def _column_key(leader: str, how: Rounding) -> tuple[str, int, bool]:
    return leader, how.grid.group_size, how.spreads


def _columns(
    inputs: LayerInputs, names: Sequence[str], moments: Mapping[str, Moment], question: Question
) -> dict[tuple[str, int, bool], ColumnOrder]:
    """What a quick GPTQ needs of each input, by `_column_key`. Made one after the other: each takes several matrices of
    in × in while it is made."""
    found: dict[tuple[str, int, bool], ColumnOrder] = {}
    for name in names if question.rounds else ():
        leader, how = inputs.leaders[name], question.rounding(name)
        key = _column_key(leader, how)
        if key not in found:
            moment = moments[leader]
            found[key] = column_order(moment if how.spreads else moment.diagonal(), how.grid.group_size)
    return found
