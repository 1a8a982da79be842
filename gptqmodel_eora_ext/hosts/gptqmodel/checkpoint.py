"""Saving and loading: a GPTQModel checkpoint that names its adapter, with this plugin or without.

The checkpoint's `quantize_config.json` gets ``"adapter": {"name": "lora", "path": "eora", "rank": r}``: the name is
`lora` because GPTQModel without the plugin knows no other, and what is in the folder is a plain LoRA. With the plugin,
a folder that holds `eora.json` is loaded as `EoRA`.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from gptqmodel.adapter.adapter import Lora
from gptqmodel.nn_modules.qlinear import BaseQuantLinear

from ...adapter import ModuleFactors
from ...files import write_json
from ...summary import QUANTIZE_CONFIG
from .. import autoround_format as autoround
from ..peft import DETAILS_FILE, AdapterError, AdapterFolder, adapter_entry, save_adapter
from .adapter import EoRA
from .quantize import RUN_ATTRIBUTE
from .run import CompensationRun
from .shared import share_inputs

log = logging.getLogger(__name__)

DEFAULT_FOLDER = "eora"
_uncompiled: ContextVar[bool] = ContextVar("uncompiled", default=False)


# Saving --------------------------------------------------------------------------------------------------------


def save_quantized(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Save by GPTQModel's writer, then the adapter beside it, then its name in `quantize_config.json`."""
    config = model.quantize_config
    adapter = config.adapter
    if not isinstance(adapter, EoRA):
        return original(model, *args, **kwargs)
    call = inspect.signature(original).bind(model, *args, **kwargs)
    call.apply_defaults()
    checkpoint = Path(call.arguments["save_dir"])
    asked = call.arguments["eora_path"]
    factors, details, path = _to_save(model)
    call.arguments["eora_path"] = None
    config.adapter = None
    try:
        result = original(*call.args, **call.kwargs)
    finally:
        config.adapter = adapter
    if factors:
        folder = _folder(asked or path, checkpoint)
        names = [name for name, _ in model.model.named_modules()]
        save_adapter(folder, factors, base_model=str(checkpoint), module_names=names, details=details)
        name_adapter(checkpoint, folder, factors)
    return result


def _folder(path: str | os.PathLike[str] | None, checkpoint: Path) -> Path:
    return checkpoint / Path(path if path is not None else DEFAULT_FOLDER).expanduser()


def name_adapter(checkpoint: Path, folder: Path, factors: Mapping[str, ModuleFactors]) -> None:
    """Write the adapter's place into the checkpoint's `quantize_config.json`, if it is inside the checkpoint."""
    inside, outside = folder.resolve(), checkpoint.resolve()
    if not inside.is_relative_to(outside):
        log.warning("EoRA: the adapter is in `%s`, outside the checkpoint `%s`, which therefore cannot name it. "
                    "Load it with GPTQModel.load(%r, adapter=EoRA(path=%r)).",
                    folder, checkpoint, str(checkpoint), str(folder))  # fmt: skip
        return
    path = checkpoint / QUANTIZE_CONFIG
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not content and autoround.read_config(checkpoint) is not None:
        content = autoround.quantize_config(checkpoint)
    if not content:
        log.warning("EoRA: `%s` has no %s to name the adapter in. Load it with adapter=EoRA(path=%r).",
                    checkpoint, QUANTIZE_CONFIG, str(folder))  # fmt: skip
        return
    content["adapter"] = adapter_entry(inside.relative_to(outside).as_posix(), factors)
    write_json(path, content)


def _to_save(model: Any) -> tuple[dict[str, ModuleFactors], Mapping[str, Any], str | None]:
    """Factors, details and the adapter's place: of the quantise run, or of what a loaded model's kernels carry."""
    adapter = model.quantize_config.adapter
    run: CompensationRun | None = getattr(model, RUN_ATTRIBUTE, None)
    if run is not None:
        return run.factors, run.details(), adapter.path
    # A loaded adapter goes into the new checkpoint, never over the folder it came from.
    source = adapter._gptqmodel_checkpoint_source
    details = _details(Path(*source) if source else Path(adapter.path))
    reports = details.pop("modules", {})
    factors = {}
    for name, kernel in _adapted_kernels(model.model).items():
        if kernel.adapter.lora_A is None:
            continue
        report = reports.get(name, {})
        factors[name] = ModuleFactors(
            lora_A=kernel.adapter.lora_A.T,
            lora_B=kernel.adapter.lora_B.T,
            requested_rank=report.get("requested_rank", kernel.adapter.lora_A.shape[1]),
            tokens=report.get("tokens", 0),
            signal=report.get("signal", 0.0),
            error_before=report.get("error_before", 0.0),
            error_after=report.get("error_after", 0.0),
            packed=kernel.adapter.packed,
        )
    return factors, details, source[1] if source else None


def _details(folder: Path) -> dict[str, Any]:
    """What `eora.json` of a loaded adapter says; nothing where it was removed since."""
    path = folder / DETAILS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# Loading -------------------------------------------------------------------------------------------------------


def is_supported(original: Callable[..., bool], config: Any) -> bool:
    """Whether a model's config tells of a quantisation that GPTQModel loads: AutoRound's packed integers are, too."""
    found = getattr(config, "quantization_config", None)
    if not isinstance(found, dict) or not autoround.is_autoround(found):
        return original(config)
    try:
        autoround.packing(found, str(getattr(config, "name_or_path", "")))
    except NotImplementedError:
        return original(config)
    return True


def config_from_pretrained(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Read a checkpoint's config; an adapter folder that holds `eora.json` becomes an `EoRA`.

    A checkpoint that AutoRound made is read in GPTQModel's terms where it has no `quantize_config.json`.
    """
    place = Path(args[0] if args else kwargs["save_dir"])
    if not (place / QUANTIZE_CONFIG).is_file() and autoround.read_config(place) is not None:
        from gptqmodel import QuantizeConfig

        return QuantizeConfig.from_quant_config(autoround.quantize_config(place))
    config = original(*args, **kwargs)
    stock = config.adapter
    source = getattr(stock, "_gptqmodel_checkpoint_source", None)
    if type(stock) is Lora and source is not None and Path(source[0], source[1], DETAILS_FILE).is_file():
        config.adapter = EoRA(rank=stock.rank, path=stock.path)
        config.adapter._gptqmodel_checkpoint_source = source
    return config


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Kernels loaded meanwhile are not compiled: GPTQModel's torch kernel compiles its unpacking anew for every shape,
    for more time than it then saves where each weight is unpacked once."""
    token = _uncompiled.set(True)
    try:
        yield
    finally:
        _uncompiled.reset(token)


def attach_adapters(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Give every kernel its factors, checked against its shape, before GPTQModel initialises the kernels; then let
    those that read the same input be computed together."""
    kernels = _adapted_kernels(model)
    if kernels:
        adapter = next(iter(kernels.values())).adapter
        if adapter.path:
            _attach(AdapterFolder.open(adapter.path), kernels)
    if _uncompiled.get():
        for module in model.modules():
            if isinstance(module, BaseQuantLinear):
                module.optimized = True
    model = original(model, *args, **kwargs)
    share_inputs(kernels)
    return model


def _attach(folder: AdapterFolder, kernels: Mapping[str, BaseQuantLinear]) -> None:
    matched = folder.match(kernels)
    kernel_names = {module: name for name, module in matched.items()}
    for module, factors in folder.factors(list(kernel_names)):
        kernel = kernels[kernel_names[module]]
        found = (factors.lora_B.shape[0], factors.lora_A.shape[1])
        expected = (kernel.out_features, kernel.in_features)
        if found != expected:
            raise AdapterError(
                f"Adapter: {module} in `{folder.path}` is for a weight of out × in = {found[0]} × {found[1]}, but the "
                f"checkpoint's is {expected[0]} × {expected[1]}. The adapter was made for "
                f"{folder.config.get('base_model_name_or_path') or 'another model'}; use it with that checkpoint."
            )
        kernel.adapter.attach(factors, kernel.runtime_device())
    without = len(kernels) - len(matched)
    log.info("EoRA: %d adapters attached from `%s`%s.", len(matched), folder.path,
             f", {without} modules have none" if without else "")  # fmt: skip


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Have the kernels of a loaded model compute without their adapters."""
    kernels = _adapted_kernels(model)
    adapters = {name: kernel.adapter for name, kernel in kernels.items()}
    for kernel in kernels.values():
        kernel.adapter = None
    try:
        yield
    finally:
        for name, kernel in kernels.items():
            kernel.adapter = adapters[name]


def _adapted_kernels(model: Any) -> dict[str, BaseQuantLinear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseQuantLinear) and isinstance(module.adapter, EoRA)
    }
