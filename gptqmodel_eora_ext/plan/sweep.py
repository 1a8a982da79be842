"""Forecasts of all modules in one sweep through the model, a layer at a time.

While a layer is there, its modules' inputs on the calibration data are gathered, their weights rounded as the quantiser
will, and the error forecast. What the modules of a kind lose together is measured beside it: for each kind (`q_proj`,
…) some other tokens go through the same layers, with the weights of that kind alone replaced by Ŵ + BA, and the
scores at the end are compared with those of the full-precision model. Forecasts stand on some thousand tokens, to which
the quantiser and the factors fit themselves, and what they lose on others is more, and more so the wider the input:
1.1 times the forecast for SmolLM2's `k_proj`, 2.4 times for its `down_proj`. Errors that all keys of a window share
cancel in the softmax, and others add up, which second orders do not see either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..solve import ColumnOrder, Grid, Moment, column_order, error_loss, gptq
from ..system.memory import release_free_memory
from ..system.side_by_side import side_by_side
from .forecast import Forecast, ModuleMoments, unreached, with_components
from .gradients import HEAD_TOKENS, Progress
from .layered import LayeredModel, Window
from .ranks import kind_of
from .rows import InputRows, moment_of
from .sensitivity import Sensitivity

log = logging.getLogger(__name__)

TINY = 1e-30
# Modules of more weights are worked on one after the other: each keeps all processors busy, and takes memory of its
# own, some ten times its weights in float32.
LARGE = 1 << 22
# A module that fewer tokens than this reach is named in the log: 4 of them a component allow rank 64 at most.
FEW_TOKENS = 256


@dataclass(frozen=True)
class Rounding:
    """How a host will round one module's weights.

    Attributes:
        bits: of a code; several to forecast each.
        grid: groups, symmetry, and the search for scales.
        spreads: whether rounding errors are spread over later columns, as GPTQ does.
    """

    bits: tuple[int, ...]
    grid: Grid
    spreads: bool = True


@dataclass(frozen=True)
class Question:
    """What a sweep is to forecast.

    Attributes:
        rounding: of a module.
        rank: components to forecast, of a module and a width.
        quantized: Ŵ of a module from its name and W, where it is known; None to find it by a quick GPTQ.
        uniform: rank with which the kinds are measured.
        weighed: whether inputs are weighed by their tokens' gradients; without, the two are taken to be independent.
    """

    rounding: Callable[[str], Rounding]
    rank: Callable[[str, int], int]
    quantized: Callable[[str, torch.Tensor], torch.Tensor] | None = None
    uniform: int = 0
    weighed: bool = True


@dataclass(frozen=True)
class Swept:
    """What a sweep found.

    Attributes:
        forecasts: by module and width.
        divergences: by kind of module: nats a token that all its modules cost at the first width of each, with factors
            of the uniform rank. Empty where kinds were not asked for.
        output_moments: G by module, that forecasts stand on; of what tokens reached.
        tokens: that forecasts stand on.
        reached: of them, by module; all, but for experts that tokens are routed to.
    """

    forecasts: Mapping[str, Mapping[int, Forecast]]
    divergences: Mapping[str, float]
    output_moments: Mapping[str, Moment]
    tokens: int = 0
    reached: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerInputs:
    """A layer while it is there.

    Attributes:
        index: of the layer.
        linears: its modules by full name, their weights in memory.
        leaders: module → the one that reads the same input. What no token reached is not there.
        rows: inputs by leader, tokens × in, as the model computed them.
    """

    index: int
    linears: Mapping[str, torch.nn.Linear]
    leaders: Mapping[str, str]
    rows: Mapping[str, torch.Tensor]


def layer_inputs(
    model: LayeredModel, modules: Sequence[str], windows: Sequence[Window], progress: Progress = iter
) -> Iterator[LayerInputs]:
    """Every layer in turn, with what its modules read of some windows, which are one layer further then."""
    for index in progress(range(len(model))):
        with model.layer(index) as layer:
            linears: dict[str, Any] = {
                name: model.model.get_submodule(name) for name in modules if name.startswith(f"{model.layers[index]}.")
            }
            with InputRows(model.layers[index], layer, linears) as watch, torch.no_grad():
                for window in windows:
                    watch.begin(window.keep)
                    window.hidden = model.run(layer, index, window.hidden, window)
            rows = {leader: watch.rows(leader) for leader in set(watch.leaders.values())}
            yield LayerInputs(index, linears, watch.leaders, rows)
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
) -> Swept:
    """Forecast every module, and measure every kind.

    Args:
        model: run layer by layer, at full precision.
        modules: full names of linear layers.
        batches: what C stands on: `input_ids` (and `attention_mask`), windows × tokens each. The sensitivity's are
            the first of them.
        sensitivity: None to compare modules by their share of the output, G = I / E‖W x‖².
        question: what to forecast.
        kind_batches: tokens that kinds are measured on; none for no measurement.
        progress: wraps the layers.
    """
    windows = model.begin(batches)
    kinds = _Kinds(model, modules, kind_batches) if kind_batches else None
    forecasts: dict[str, dict[int, Forecast]] = {}
    relative: dict[str, torch.Tensor] = {}
    tokens = sum(int(window.keep.sum()) for window in windows)
    counts: dict[str, int] = {}
    for inputs in layer_inputs(model, modules, windows, progress):
        reached = [name for name in inputs.leaders if sensitivity is None or name in sensitivity]
        counts |= {name: len(inputs.rows[leader]) for name, leader in inputs.leaders.items()}
        _tell_routing(inputs, reached, tokens)
        replaced: dict[str, torch.Tensor] = {}
        for one in _of_layer(inputs, reached, tokens, sensitivity, question, model.device):
            forecasts[one.name] = one.forecasts
            if kinds is not None:
                replaced[one.name] = one.compensated
            if sensitivity is None and isinstance(one.output_moment, torch.Tensor):
                relative[one.name] = one.output_moment
        for name in inputs.linears:
            forecasts.setdefault(name, {bits: unreached(question.rank(name, bits))
                                        for bits in question.rounding(name).bits})  # fmt: skip
        if kinds is not None:
            kinds.step(inputs, replaced)
        # The next layer comes before the loop lets go of it.
        del inputs, replaced
    output_moments = relative if sensitivity is None else sensitivity
    return Swept(forecasts, kinds.divergences() if kinds else {}, output_moments, tokens, counts)


@dataclass(frozen=True)
class _Found:
    """Of a module: its forecasts, Ŵ + BA of the first width in its dtype, and G."""

    name: str
    forecasts: dict[int, Forecast]
    compensated: torch.Tensor
    output_moment: Moment


def _of_layer(
    inputs: LayerInputs,
    reached: Sequence[str],
    tokens: int,
    sensitivity: Sensitivity | None,
    question: Question,
    device: torch.device,
) -> list[_Found]:
    """Forecasts of a layer's modules that tokens reached."""
    moments = {leader: moment_of(rows, leader) for leader, rows in inputs.rows.items()}
    columns = _columns(inputs, moments, question)

    def found(name: str) -> _Found:
        weight = inputs.linears[name].weight.detach()
        wide = weight.to(torch.float32)
        leader, how = inputs.leaders[name], question.rounding(name)
        known = module_moments(name, wide, moments[leader], inputs.rows[leader], tokens, sensitivity)
        if not question.weighed:
            known = replace(known, weighted=None)
        if question.quantized is not None:
            rounded = [question.quantized(name, weight).to(torch.float32)]
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
        return _Found(name, forecasts, compensated[0], known.output)

    largest = max((one.weight.numel() for one in inputs.linears.values()), default=0)
    return list(side_by_side(found, reached, device) if largest <= LARGE else map(found, reached))


def _tell_routing(inputs: LayerInputs, reached: Sequence[str], tokens: int) -> None:
    """Say once a layer how many experts had few tokens or none; their ranks are small, or 0."""
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
    """What a module's forecast stands on.

    Args:
        name: full module name.
        weight: W, out × in, float32.
        inputs: C, of ``rows``.
        rows: inputs, of those of the tokens that reached it, × in.
        tokens: in all.
        sensitivity: None for G = I / E‖W x‖², times the share of tokens that reached it.
    """
    if sensitivity is None:
        signal = 2 * error_loss(weight, inputs, torch.ones(len(weight), device=weight.device))
        share = len(rows) / max(tokens, 1)
        return ModuleMoments(inputs, torch.full((len(weight),), share / max(signal, TINY), device=weight.device))
    squares = sensitivity.squares(name).to(weight.device)
    # Gradients are of the first tokens.
    weighted = rows[: len(squares)] * squares.sqrt()[:, None]
    output = sensitivity[name].to(weight.device)
    return ModuleMoments(inputs, output, moment_of(weighted, name, max(float(squares.sum()), TINY)))


def _column_key(leader: str, how: Rounding) -> tuple[str, int, bool]:
    return leader, how.grid.group_size, how.spreads


def _columns(
    inputs: LayerInputs, moments: Mapping[str, Moment], question: Question
) -> dict[tuple[str, int, bool], ColumnOrder]:
    """What quick GPTQ needs of each input; one after the other, since it takes several matrices of in × in."""
    found: dict[tuple[str, int, bool], ColumnOrder] = {}
    for name, leader in inputs.leaders.items() if question.quantized is None else ():
        how = question.rounding(name)
        key = _column_key(leader, how)
        if key not in found:
            moment = moments[leader]
            found[key] = column_order(moment if how.spreads else moment.diagonal(), how.grid.group_size)
    return found


class _Kinds:
    """Windows that go through the layers once as they are and once for each kind of module, its weights replaced."""

    def __init__(self, model: LayeredModel, modules: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> None:
        self._model = model
        self._windows = model.begin(batches)
        self._hidden = {
            kind: [window.hidden for window in self._windows] for kind in dict.fromkeys(map(kind_of, modules))
        }

    @torch.no_grad()
    def step(self, inputs: LayerInputs, replaced: Mapping[str, torch.Tensor]) -> None:
        """Through the layer that is there."""
        model, index = self._model, inputs.index
        layer = model.model.get_submodule(model.layers[index])
        for window in self._windows:
            window.hidden = model.run(layer, index, window.hidden, window)
        for kind, streams in self._hidden.items():
            with _replaced(inputs.linears, {name: one for name, one in replaced.items() if kind_of(name) == kind}):
                self._hidden[kind] = [
                    model.run(layer, index, hidden, window)
                    for hidden, window in zip(streams, self._windows, strict=True)
                ]

    @torch.no_grad()
    def divergences(self) -> dict[str, float]:
        """Kullback-Leibler divergence of each kind's scores from those of the model, mean over tokens that count."""
        sums = dict.fromkeys(self._hidden, 0.0)
        tokens = 0
        with self._model.head() as head:
            for place, window in enumerate(self._windows):
                tokens += int(window.keep.sum())
                counted = {kind: streams[place][window.keep] for kind, streams in self._hidden.items()}
                plain = window.hidden[window.keep]
                for start in range(0, len(plain), HEAD_TOKENS):
                    some = slice(start, start + HEAD_TOKENS)
                    likely = head(plain[some]).float().softmax(-1)
                    # Σ p log p, of each token.
                    entropies = torch.special.entr(likely).sum(-1)
                    for kind, hidden in counted.items():
                        scores = head(hidden[some]).float()
                        # Σ p log q, q the softmax of the scores, which is not formed.
                        crossed = torch.linalg.vecdot(likely, scores) - scores.logsumexp(-1)
                        sums[kind] -= float((entropies + crossed).sum(dtype=torch.float64))
        return {kind: total / max(tokens, 1) for kind, total in sums.items()}


@contextmanager
def _replaced(linears: Mapping[str, torch.nn.Linear], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    originals = {name: linears[name].weight.data for name in weights}
    try:
        for name, weight in weights.items():
            linears[name].weight.data = weight
        yield
    finally:
        for name, weight in originals.items():
            linears[name].weight.data = weight
