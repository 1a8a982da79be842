"""Which models an evaluation is of: full precision, quantised checkpoints, and adapters over them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapter.errors import AdapterError
from ..adapter.folder import AdapterFolder
from ..adapter.naming import DEFAULT_FOLDER
from ..adapter.summary import find_adapter
from ..formats.names import ADAPTER_CONFIG, MODEL_CONFIG, PRUNING_DETAILS, QUANTIZE_CONFIG
from ..formats.sizes import ModuleShape
from .size import stored_modules, tensor_headers

FULL_PRECISION, QUANTISED, ADAPTED = "full precision", "quantised", "quantised with adapter"
# Where models of several parts keep the text model's settings.
TEXT_CONFIG = "text_config"
CONTEXT = "max_position_embeddings"


@dataclass(frozen=True)
class Subject:
    """One model to evaluate.

    Attributes:
        name: as tables call it.
        kind: `FULL_PRECISION`, `QUANTISED` or `ADAPTED`.
        model: folder of the model or checkpoint, or a hub name of one at full precision.
        adapter: its adapter's folder; None without one.
    """

    name: str
    kind: str
    model: str
    adapter: Path | None = None


def resolve(
    paths: Sequence[str],
    *,
    base: str | None = None,
    adapters: Sequence[Path] = (),
    adapters_only: bool = False,
) -> list[Subject]:
    """The models that a command names.

    Args:
        paths: checkpoints, quantised or not, and adapters' folders; an adapter goes over the quantised checkpoint
            named before it. `NAME=PATH` gives a model a name of its own.
        base: the full-precision model that all are compared with, a folder or a hub name, also as `NAME=…`.
        adapters: over the first checkpoint, in place of the one that it names.
        adapters_only: leaves out the row without its adapter of a checkpoint that names one.

    Raises:
        ValueError: for a path that is no model and no adapter, an adapter without a checkpoint, or a base that is
            quantised.
    """
    found = []
    if base is not None:
        name, place = _named(base)
        if Path(place).is_dir() and is_quantised(Path(place)):
            raise ValueError(f"--base `{place}` is quantised; name the full-precision model that it was made from.")
        found.append(Subject(name or Path(place).name, FULL_PRECISION, place))
    checkpoint: Path | None = None
    for given in paths:
        name, place = _named(given)
        path = Path(place)
        if (path / ADAPTER_CONFIG).is_file() and not (path / MODEL_CONFIG).is_file():
            found.append(_adapted(name, path, checkpoint))
            continue
        if not (path / MODEL_CONFIG).is_file():
            raise ValueError(f"`{path}` has no {MODEL_CONFIG}; it is no checkpoint folder.")
        if not is_quantised(path):
            if adapters:
                raise ValueError(_not_quantised(path))
            if not any(one.kind == FULL_PRECISION and one.model == place for one in found):
                found.append(Subject(name or path.name, FULL_PRECISION, place))
            continue
        own = None if adapters and checkpoint is None else find_adapter(path, required=False)
        checkpoint = path
        if own is None or not adapters_only:
            found.append(Subject(name if name and own is None else path.name, QUANTISED, place))
        if own is not None:
            found.append(_adapted(name, own, path))
        if adapters:
            found += [_adapted(None, one, path) for one in adapters]
            adapters = ()
    return _told_apart(found)


def is_quantised(checkpoint: Path) -> bool:
    """Whether a model's folder says how it was compressed: quantised, in either place where that is written, or pruned
    by `eora prune`, or compensated by `eora generate`."""
    config = json.loads((checkpoint / MODEL_CONFIG).read_text(encoding="utf-8"))
    marks = (QUANTIZE_CONFIG, PRUNING_DETAILS, f"{DEFAULT_FOLDER}/{ADAPTER_CONFIG}")
    return bool(config.get("quantization_config")) or any((checkpoint / mark).is_file() for mark in marks)


def check_context(subjects: Iterable[Subject], window: int) -> None:
    """Refuse windows that are longer than a model's context, as far as folders tell before a model is loaded.

    Raises:
        ValueError: naming the model's configuration.
    """
    for one in subjects:
        path = Path(one.model) / MODEL_CONFIG
        if path.is_file():
            check_window(json.loads(path.read_text(encoding="utf-8")), window, str(path))


def check_window(config: Mapping[str, Any], window: int, where: str) -> None:
    """Refuse a window that is longer than a model's context.

    Args:
        config: of the model, as its `config.json`.
        window: tokens.
        where: names the configuration.

    Raises:
        ValueError: telling both lengths.
    """
    nested = config.get(TEXT_CONFIG)
    longest = config.get(CONTEXT) or (nested.get(CONTEXT) if isinstance(nested, Mapping) else None)
    if isinstance(longest, int) and window > longest:
        raise ValueError(
            f"`{where}`: the model reads {longest} tokens at most ({CONTEXT}), and a window of {window} is asked. "
            f"Pass --window {longest} or less."
        )


def _named(given: str) -> tuple[str | None, str]:
    """A name and a place, of `NAME=PLACE`; a place that holds `=` itself is taken as it stands."""
    name, mark, place = given.partition("=")
    if not mark or not name or not place or Path(given).exists():
        return None, given
    return name, place


def _adapted(name: str | None, adapter: Path, checkpoint: Path | None) -> Subject:
    if checkpoint is None:
        raise ValueError(
            f"`{adapter}` is an adapter; name the quantised checkpoint that it is for before it: eora eval CHECKPOINT "
            f"{adapter}."
        )
    folder = AdapterFolder.open(adapter)
    modules = {one.shape.name: one.shape for one in stored_modules(checkpoint)}
    if modules:
        # Told now, by headers, rather than once the models before it are measured.
        _check_shapes(folder, modules)
    return Subject(name or f"{checkpoint.name} + {adapter.name}", ADAPTED, str(checkpoint), adapter)


def _check_shapes(folder: AdapterFolder, modules: Mapping[str, ModuleShape]) -> None:
    """Refuse an adapter for modules that the checkpoint lacks, or that have another size there.

    Raises:
        AdapterError: naming the module, and both sizes.
    """
    headers = tensor_headers(folder.path)
    for name, module in folder.match(modules).items():
        if folder.is_packed:
            found = folder.features[module]
        else:
            keys = folder.keys[module]
            found = (headers[keys["lora_A"]][0][-1], headers[keys["lora_B"]][0][0])
        shape = modules[name]
        if found != (shape.in_features, shape.out_features):
            raise AdapterError(
                f"Adapter: {module} in `{folder.path}` has {found[0]} inputs and {found[1]} outputs, but the "
                f"checkpoint's has {shape.in_features} and {shape.out_features}. It was made for "
                f"{folder.settings.base_model or 'another model'}; use it with that checkpoint."
            )


def _not_quantised(path: Path) -> str:
    return (
        f"`{path}` is not quantised, and an adapter corrects the checkpoint that it was made for. Name that "
        f"checkpoint, or leave the adapter out."
    )


def _told_apart(subjects: Sequence[Subject]) -> list[Subject]:
    """The same with whole paths for names where two are called the same."""
    names = [one.name for one in subjects]
    whole = [one.model + (f" + {one.adapter}" if one.adapter else "") for one in subjects]
    told = [
        one if names.count(one.name) == 1 else replace(one, name=path)
        for one, path in zip(subjects, whole, strict=True)
    ]
    repeated = next((one.name for one in told if [other.name for other in told].count(one.name) > 1), None)
    if repeated is not None:
        raise ValueError(f"`{repeated}` is named twice. Leave one out, or tell them apart as NAME=PATH.")
    return told
