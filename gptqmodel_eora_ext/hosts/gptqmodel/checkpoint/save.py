"""Saving: a GPTQModel checkpoint that names its adapter, so that it loads with this plugin or without."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear import BaseQuantLinear

from ....adapter.checkpoint import replaced_checkpoint
from ....adapter.factors import ModuleFactors
from ....adapter.folder import AdapterFolder
from ....adapter.naming import DEFAULT_FOLDER
from ....adapter.settings import read_details
from ....formats.names import ADAPTER_DETAILS
from ....loop.run import write_adapter
from ..adapter import EoRA
from ..quantize import RUN_ATTRIBUTE
from ..refining import refine_written
from ..run import CompensationRun

# GPTQModel's names of a checkpoint's weights: one file, or the list of several.
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


def save_quantized(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Save a model with its adapter in one step.

    GPTQModel's writer writes into a new folder; the adapter and its name in `quantize_config.json` are added there;
    then that folder takes the place of what was there (`adapter.checkpoint`). A model without an `EoRA` is saved by
    ``original``.

    Raises:
        OSError: when there is too little space, or a file cannot be written.
    """
    run: CompensationRun | None = getattr(model, RUN_ATTRIBUTE, None)
    if run is not None and run.group is not None:
        return _save_shared(original, model, run, args, kwargs)
    return _save(original, model, *args, **kwargs)


def _save_shared(original: Callable[..., Any], model: Any, run: CompensationRun, args: Any, kwargs: Any) -> Any:
    """Rank 0 saves what all processes of a group have made, and the others wait until it has."""
    assert run.group is not None
    run.group.at("saving" if run.group.is_first else "waiting for rank 0 to save")
    result = _save(original, model, *args, **kwargs) if run.group.is_first else None
    run.group.barrier("waiting for rank 0 to save")
    return result


def _save(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
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
    loaded = model.model
    with replaced_checkpoint(checkpoint, needed=_bytes_to_write(model, factors)) as fresh:
        call.arguments["save_dir"] = str(fresh)
        config.adapter = None
        try:
            result = original(*call.args, **call.kwargs)
        finally:
            config.adapter = adapter
            if model.load_quantized_model:
                # GPTQModel reads the checkpoint anew to write it, and leaves that model, without adapters, in place.
                model.model = loaded
        if factors:
            folder = _folder(asked or path, checkpoint, fresh)
            names = [name for name, _ in model.model.named_modules()]
            write_adapter(fresh, folder, factors, names, details, base_model=checkpoint)
    _remember_weights(loaded, checkpoint.resolve())
    run: CompensationRun | None = getattr(model, RUN_ATTRIBUTE, None)
    if run is not None and run.keeping is not None:
        run.keeping.finish()
    if factors and run is not None and run.refine is not None and run.refinement is None:
        _refine(model, run, checkpoint, _folder(asked or path, checkpoint, checkpoint))
    return result


def _refine(model: Any, run: CompensationRun, checkpoint: Path, folder: Path) -> None:
    """Refine what was written, and have the run carry it, so that another save writes the refined adapter."""
    assert run.refine is not None
    refined = AdapterFolder.open(
        refine_written(checkpoint, str(model.model_local_path), folder, run.refine_windows, run.refine)
    )
    names = {stored: name for name, stored in refined.match(run.factors).items()}
    run.factors |= {
        names[stored]: ModuleFactors.of_unknown_error(*(read.packed or (read.lora_A, read.lora_B.T)))
        for stored, read in refined.factors(list(names))
    }
    run.refinement = (refined.details or {})["refinement"]


def _remember_weights(loaded: Any, checkpoint: Path) -> None:
    """Tell a model that was saved over the folder it was loaded from which file there its next save has to read."""
    read = getattr(loaded, "checkpoint_file_name", None)
    if isinstance(read, str) and Path(read).resolve().parent == checkpoint:
        index = checkpoint / WEIGHTS_INDEX
        loaded.checkpoint_file_name = str(index if index.is_file() else checkpoint / WEIGHTS)


def _folder(path: str | os.PathLike[str] | None, checkpoint: Path, fresh: Path) -> Path:
    """The adapter's folder: in the new folder of the checkpoint, where it belongs inside the checkpoint."""
    folder = (checkpoint / Path(path if path is not None else DEFAULT_FOLDER).expanduser()).resolve()
    root = checkpoint.resolve()
    return fresh / folder.relative_to(root) if folder.is_relative_to(root) else folder


def _bytes_to_write(model: Any, factors: Mapping[str, ModuleFactors]) -> int:
    """About what a save writes: the tensors that the model holds, those on disk included, and the factors."""
    tensors = {id(one): one for one in model.model.state_dict(keep_vars=True).values()}.values()
    held = sum(one.numel() * one.element_size() for one in tensors if isinstance(one, torch.Tensor))
    return held + sum(one.nbytes for one in factors.values())


def _to_save(model: Any) -> tuple[dict[str, ModuleFactors], Mapping[str, Any], str | None]:
    """Factors, details and the adapter's place: of the quantise run, or of what a loaded model's kernels carry."""
    adapter = model.quantize_config.adapter
    run: CompensationRun | None = getattr(model, RUN_ATTRIBUTE, None)
    if run is not None:
        return run.factors, run.details(), adapter.path
    # A loaded adapter goes into the new checkpoint, never over the folder it came from.
    source = adapter._gptqmodel_checkpoint_source
    if adapter.kernels_alone:
        return {}, {}, None
    details = _details(Path(*source) if source else Path(adapter.path))
    reports = details.pop("modules", {})
    factors = {}
    for name, kernel in adapted_kernels(model.model).items():
        if kernel.adapter.mixture is not None:
            raise NotImplementedError(
                "EoRA: a model with an ensemble is not saved as one adapter. Copy its checkpoint's folder, or export a "
                "member: eora ensemble export."
            )
        if not kernel.adapter.has_factors:
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
    path = folder / ADAPTER_DETAILS
    return read_details(path) if path.is_file() else {}


def adapted_kernels(model: Any) -> dict[str, BaseQuantLinear]:
    """Full module name → quantised linear, of those that have an `EoRA`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseQuantLinear) and isinstance(module.adapter, EoRA)
    }
