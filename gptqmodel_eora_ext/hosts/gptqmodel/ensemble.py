"""An ensemble on GPTQModel's kernels: the members' factors are stacked and attached, and prompts are routed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gptqmodel.nn_modules.qlinear import BaseQuantLinear

from ...adapter.ensemble.folder import ROUTER_FILE, EnsembleFolder
from ...adapter.ensemble.router import Router
from ...adapter.errors import AdapterError
from ...adapter.layers import layers_of
from ...kernels.row_weights import Mixture
from ..ensemble import ATTRIBUTE, Ensemble

log = logging.getLogger(__name__)

# What stands in the path of a module that tokens are routed to.
EXPERTS = ".experts."


def attach_ensemble(model: Any, folder: Path, kernels: Mapping[str, BaseQuantLinear]) -> None:
    """Give every kernel the factors of all members.

    Args:
        model: transformers' model with GPTQModel's kernels.
        folder: of the ensemble.
        kernels: full module name → kernel with an `EoRA`.

    Raises:
        AdapterError: for a folder that is damaged, or of another checkpoint.
        NotImplementedError: for experts: a kernel sees tokens that were picked from all prompts, in no known order.
    """
    ensemble = EnsembleFolder.open(folder)
    expert = next((name for name in kernels if EXPERTS in name), None)
    if expert is not None:
        raise NotImplementedError(
            f"EoRA: an ensemble cannot serve {expert}: tokens of all prompts are routed to experts, in no known order. "
            f"Load one adapter: eora ensemble export."
        )
    place = Path(str(getattr(model.config, "_name_or_path", "")))
    if place.is_dir():
        ensemble.check_checkpoint(place)
    mixture = Mixture(ensemble.names)
    for kernel in kernels.values():
        kernel.adapter.mixture = mixture
    adapted = 0
    for module, factors in ensemble.factors(list(kernels)):
        kernel = kernels[module]
        found, expected = (factors.out_features, factors.in_features), (kernel.out_features, kernel.in_features)
        if found != expected:
            raise AdapterError(
                f"Ensemble: {module} in `{folder}` is for a weight of out × in = {found[0]} × {found[1]}, but the "
                f"checkpoint's is {expected[0]} × {expected[1]}. Use the ensemble with its own checkpoint."
            )
        kernel.adapter.attach_members(factors, mixture, kernel.runtime_device())
        adapted += 1
    router = None
    if (folder / ROUTER_FILE).is_file():
        router = Router.load(folder / ROUTER_FILE, ensemble.names[1:], ensemble.settings)
        read = [kernels[name].in_features if name in kernels else 0 for name in router.reads]
        if not all(read) or sum(read) != len(router.mean):
            raise AdapterError(
                f"Ensemble: the router of `{folder}` reads {len(router.mean)} values of {', '.join(router.reads)}; in "
                f"this checkpoint they have {read}. Make the router again: eora ensemble make."
            )
    layers = layers_of(model, kernels)
    if ensemble.depth >= len(layers):
        raise AdapterError(f"Ensemble: `{folder}` has members from layer {ensemble.depth} on, the model has "
                           f"{len(layers)} layers. Use it with its own checkpoint.")  # fmt: skip
    setattr(model, ATTRIBUTE, Ensemble(model, layers, mixture, ensemble, router))
    log.info(
        "EoRA: an ensemble of %d members attached to %d modules from `%s`.", len(ensemble.members), adapted, folder
    )


def generate(original: Callable[..., Any], model: Any, *args: Any, weights: Any = None, **kwargs: Any) -> Any:
    """GPTQModel's `generate`, which an ensemble may be told weights for: `weights={"math": 1.0}`, or one for each row.

    Raises:
        AdapterError: for weights that are no weights of the ensemble's members.
        TypeError: for weights and a model without an ensemble.
    """
    if weights is None:
        return original(model, *args, **kwargs)
    ensemble = getattr(model.model, ATTRIBUTE, None)
    if not isinstance(ensemble, Ensemble):
        raise TypeError("EoRA: generate() got weights, but this model was loaded without an ensemble.")
    with ensemble.told(weights):
        return original(model, *args, **kwargs)
