"""`eora imatrix`: how much each input channel matters, measured on the full-precision model, for `llama-quantize`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ...calibration.token_ids import require_token_ids
from ...capture import RoutedRows
from ...capture.second_moment import DiagonalMoment
from ...formats.gguf.imatrix import Importance, write_imatrix
from ...formats.gguf.model import GGUFModel
from ...plan.gradients import Progress
from ...plan.layered import LayeredModel, Window
from ...plan.survey import first_tokens
from ..jobs import ImatrixJob
from ..registry import full_precision
from .names import Place, TensorNames

log = logging.getLogger(__name__)


def measure_imatrix(job: ImatrixJob) -> int:
    """Write an importance matrix, and return the number of tensors in it.

    One layer's weights are in memory at a time, in float32, and the hidden states of all windows.

    Args:
        job: its model is any GGUF file of the base (F16 for instance), which names the tensors.

    Raises:
        ValueError: for a broken file, calibration of another tokenizer, or inputs that are not finite.
        NotImplementedError: for a model that cannot be run layer by layer.
    """
    file = GGUFModel(job.model)
    names = TensorNames(file)
    opened = full_precision(job.base)(job.base, job.trust_remote_code)
    shapes = {shape.name: shape for shape in opened.shapes}
    places = {name: _placed(name, file, names, job.base) for name in shapes}
    model = opened.layered()
    windows = first_tokens(job.windows, sum(len(one["input_ids"]) for one in job.windows))
    vocabulary = model.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    for one in windows:
        require_token_ids(one["input_ids"], vocabulary)
    moments = input_energies(model, list(shapes), windows, job.bar("measuring layers"))
    found = _by_tensor(moments, places, {name: shape.in_features for name, shape in shapes.items()}, file)
    seqlen = max(len(one["input_ids"]) for one in job.windows)
    write_imatrix(job.output, found, source=job.source, windows=len(job.windows), seqlen=seqlen)
    return len(found)


def _placed(name: str, file: GGUFModel, names: TensorNames, base: str) -> Place:
    place = names.place(name)
    if place is None or place.tensor not in file.tensors:
        raise ValueError(
            f"EoRA: `{file.path}` is no file of `{base}`: it holds no tensor for {name}. Name the "
            f"model's own GGUF file."
        )
    return place


@torch.no_grad()
def input_energies(
    model: LayeredModel, modules: Sequence[str], batches: Sequence[Mapping[str, Any]], progress: Progress
) -> dict[str, DiagonalMoment]:
    """Σ x² of each module's input over tokens that count; modules that no token reached are left out.

    Args:
        model: run layer by layer.
        modules: full names of linear layers.
        batches: `input_ids` and `attention_mask`, windows × tokens each.
        progress: wraps the layers.
    """
    found: dict[str, DiagonalMoment] = {}
    windows = model.begin(batches)
    for index in progress(range(len(model))):
        _run_layer(model, index, modules, windows, found)
    for moment in found.values():
        moment.require_finite()
    return found


def _run_layer(
    model: LayeredModel,
    index: int,
    modules: Sequence[str],
    windows: Sequence[Window],
    found: dict[str, DiagonalMoment],
) -> None:
    """Take all windows through a layer, and sum what its modules read."""
    prefix = f"{model.layers[index]}."
    keep = windows[0].keep
    with model.layer(index) as layer, ExitStack() as handles:
        routed = handles.enter_context(RoutedRows(layer, lambda: keep))
        for name in modules:
            if not name.startswith(prefix):
                continue
            linear: Any = layer.get_submodule(name.removeprefix(prefix))
            moment = DiagonalMoment(linear.in_features, name)
            hook = _hook(moment, name.removeprefix(prefix), routed, found)
            handles.callback(linear.register_forward_pre_hook(hook).remove)
        for window in windows:
            keep = window.keep
            window.hidden = model.run(layer, index, window.hidden, window)


def _hook(
    moment: DiagonalMoment, path: str, routed: RoutedRows, found: dict[str, DiagonalMoment]
) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        moment.add(inputs[0], routed.real(path, inputs[0]))
        if moment.tokens:
            found[moment.name] = moment

    return hook


def _by_tensor(
    moments: Mapping[str, DiagonalMoment], places: Mapping[str, Place], widths: Mapping[str, int], file: GGUFModel
) -> dict[str, Importance]:
    """Sums by the file's tensors; experts of one tensor together, zeros for those that no token reached."""
    found: dict[str, Importance] = {}
    for name, place in places.items():
        moment = moments.get(name)
        count = 1 if place.expert is None else file.info(place.tensor).shape[0]
        if place.tensor not in found:
            found[place.tensor] = Importance(torch.zeros(count, widths[name]), torch.zeros(count))
        if moment is not None:
            row = place.expert or 0
            found[place.tensor].sums[row] = moment.mean() * moment.tokens
            found[place.tensor].counts[row] = moment.tokens
    unseen = [tensor for tensor, one in found.items() if not bool((one.counts > 0).all())]
    if unseen:
        log.warning("EoRA: of %d tensors some or all experts were reached by no calibration token, for instance %s; "
                    "llama-quantize weighs their channels alike.", len(unseen), unseen[0])  # fmt: skip
    return {tensor: one for tensor, one in found.items() if bool((one.counts > 0).any())}
