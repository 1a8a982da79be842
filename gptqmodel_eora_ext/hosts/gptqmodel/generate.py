"""`GPTQModel.adapter.generate(adapter=EoRA(…), …)`: an adapter for a checkpoint that is already quantised."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization.config import METHOD
from gptqmodel.utils.backend import BACKEND
from gptqmodel.utils.torch import torch_empty_cache

from ...adapter.folder import AdapterFolder
from ...adapter.layers import layer_number
from ...adapter.naming import DEFAULT_FOLDER
from ...adapter.save import save_adapter
from ...formats.autoround import read_config
from ...loop.resume import Keeping
from ...loop.run import write_adapter
from ...loop.shared import fingerprint
from ...loop.weights import check_weight_files, weights_fingerprint
from ...system.distributed import by_first
from ...system.memory import release_free_memory
from ..base_check import check_embeddings, scales_were_moved
from ..terminal import watch_layers
from .adapter import EoRA
from .awq import move_scales
from .checkpoint.load import uncompiled
from .known_weights import CheckpointProcessor, known_kernels
from .methods import ROTATION, finished_backend
from .quantize import RUN_ATTRIBUTE, CompensatingLooper, logs_out_of_the_way
from .refining import refine_written
from .run import CompensationRun, batches_required, rounds_to_make

log = logging.getLogger(__name__)

# Why `generate` makes one round only, for the message.
FINISHED = "the checkpoint is quantised already"


def generate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """GPTQModel's `adapter.generate`: an `EoRA` is made here, any other adapter by `original`.

    `adapter.path` is where to write; a relative path counts from the working directory; left out, the adapter goes
    into the checkpoint, which then names it. Errors are those of `generate_adapter`.

    Example:
        >>> GPTQModel.adapter.generate(
        ...     adapter=EoRA(rank=64),
        ...     model_id_or_path="Qwen/Qwen3-8B",  # full precision
        ...     quantized_model_id_or_path="out",  # the finished checkpoint
        ...     calibration_dataset=calibration,
        ... )
    """
    call = inspect.signature(original).bind(*args, **kwargs)
    call.apply_defaults()
    options = call.arguments
    if not isinstance(options["adapter"], EoRA):
        return original(*args, **kwargs)
    loading = {key: options[key] for key in ("trust_remote_code", "dtype", "device") if options[key] is not None}
    generate_adapter(
        options["adapter"],
        options["model_id_or_path"],
        Path(options["quantized_model_id_or_path"]),
        options["calibration_dataset"],
        batch_size=options["batch_size"],
        calibration_concat_size=options["calibration_dataset_concat_size"],
        calibration_sort=options["calibration_dataset_sort"],
        calibration_concat_separator=options["calibration_concat_separator"],
        tokenizer=options["tokenizer"],
        loading=loading,
    )
    return None


def generate_adapter(
    adapter: EoRA,
    base: str,
    checkpoint: Path,
    calibration: Sequence[Any],
    *,
    batch_size: int = 1,
    calibration_concat_size: int | None = None,
    calibration_sort: str | None = None,
    calibration_concat_separator: str | None = None,
    tokenizer: Any = None,
    loading: Mapping[str, Any] | None = None,
    over: Path | None = None,
    without_layers: int = 0,
    report: Callable[[int, int], None] | None = None,
    keeping: Keeping | None = None,
) -> Path:
    """Make an adapter for a finished checkpoint and return its folder.

    Args:
        adapter: rank, and where to write.
        base: the full-precision model that the checkpoint was quantised from.
        checkpoint: its folder.
        calibration: what GPTQModel's `quantize` takes.
        batch_size: windows per forward.
        calibration_concat_size: as in GPTQModel's `quantize`, like the next two.
        calibration_sort: see above.
        calibration_concat_separator: see above.
        tokenizer: for calibration in texts; the base model's by default.
        loading: passed to `GPTQModel.load` for both models.
        over: as in `AdapterJob`, like the next.
        without_layers: see above.
        report: called with (layers done, layers in all).
        keeping: where finished layers are kept, so that an interrupted call is gone on with; None for nowhere.

    Raises:
        ValueError: for missing rank or data, a checkpoint of another model, a folder that cannot be written to.
        NotImplementedError: for a checkpoint that cannot be dequantised here.
    """
    if isinstance(calibration, Iterator):
        calibration = list(calibration)
    if calibration is None or (hasattr(calibration, "__len__") and len(calibration) == 0):
        raise ValueError("EoRA: the calibration dataset is empty. Pass texts or token ids.")
    adapter.settle_for_making()
    rounds = rounds_to_make(adapter, FINISHED)
    folder = _folder_for(adapter, checkpoint)
    loading = loading or {}
    with logs_out_of_the_way():
        config, kernels, others = _load_kernels(checkpoint, loading)
        known = known_kernels(kernels, None if over is None else AdapterFolder.open(over))
        _leave_out(config, kernels, without_layers)
        run = CompensationRun(adapter, config.dynamic, method=str(config.method.value), rounds=rounds)
        model = _load_base(base, checkpoint, config, kernels, others, loading)
        setattr(model, RUN_ATTRIBUTE, run)
        run.keeping, run.asked, run.source = keeping, adapter.to_dict(), weights_fingerprint(checkpoint)
        if run.group is not None:
            run.group.agree({"the checkpoint": fingerprint(str(checkpoint))})
        if report is not None:
            watch_layers(model, report)
        with batches_required(model):
            processor = CheckpointProcessor(
                known,
                tokenizer=tokenizer or model.tokenizer,
                qcfg=config,
                calibration=calibration,
                prepare_dataset_func=model.prepare_dataset,
                calibration_concat_size=calibration_concat_size,
                calibration_sort=calibration_sort,
                calibration_concat_separator=calibration_concat_separator,
                batch_size=batch_size,
            )
        with keeping or contextlib.nullcontext():
            CompensatingLooper(model, processors=[processor]).loop()
    names = [name for name, _ in model.model.named_modules()]
    details = run.details()
    if over is None:
        by_first(lambda: write_adapter(checkpoint, folder, run.factors, names, details))
    else:
        # A member: the checkpoint names the adapter beneath it.
        by_first(
            lambda: save_adapter(
                folder, run.factors, base_model=str(checkpoint), module_names=names, details=details
            )
        )
    log.info("EoRA: %d adapters written to `%s`.", len(run.factors), folder)
    if keeping is not None:
        keeping.finish()
    if run.refine is None:
        return folder
    del model, kernels, processor
    release_free_memory()
    return refine_written(checkpoint, base, folder, run.refine_windows, run.refine)


def _leave_out(config: Any, kernels: Mapping[str, BaseQuantLinear], layers: int) -> None:
    """Have the modules of the first layers get rank 0."""
    names = [name for name in kernels if (found := layer_number(name)) is not None and found < layers]
    if names:
        # Ahead of the checkpoint's own entries, of which the first that fits a module counts.
        pattern = f"^(?:{'|'.join(map(re.escape, names))})$"
        config.dynamic = {pattern: {"adapter": {"rank": 0}}, **(config.dynamic or {})}


def _folder_for(adapter: EoRA, checkpoint: Path) -> Path:
    if adapter.path:
        return Path(adapter.path)
    if not os.access(checkpoint, os.W_OK):
        raise ValueError(f"EoRA: cannot write into `{checkpoint}`. Name a folder: EoRA(rank=…, path=…).")
    return checkpoint / DEFAULT_FOLDER


def _load_base(
    base: str,
    checkpoint: Path,
    config: Any,
    kernels: dict[str, BaseQuantLinear],
    norms: dict[str, torch.Tensor],
    loading: Mapping[str, Any],
) -> Any:
    """GPTQModel's model of the full-precision base, checked to be the checkpoint's, and in its coordinates."""
    from gptqmodel import GPTQModel

    log.info("EoRA: loading the full-precision model `%s`.", base)
    model = GPTQModel.load(base, quantize_config=config, **loading)
    _check_same_model(model, kernels, checkpoint, base)
    native = Path(model.model_local_path)
    check_embeddings(checkpoint, native, base)
    check_weight_files(native)
    if read_config(checkpoint) is None:
        moved = config.export_quant_method() == METHOD.AWQ
    else:
        # AutoRound's export to AWQ's format moves no scales, its algorithm AWQ does whatever the format.
        moved = scales_were_moved(checkpoint, native)
    if moved:
        if config.offload_to_disk:
            config.offload_to_disk = False
            model = GPTQModel.load(base, quantize_config=config, **loading)
        move_scales(model, norms, kernels)
    return model


def _load_kernels(
    checkpoint: Path, loading: Mapping[str, Any]
) -> tuple[Any, dict[str, BaseQuantLinear], dict[str, torch.Tensor]]:
    """The checkpoint's config, its quantised linears, and its one-dimensional parameters (norms)."""
    from gptqmodel import GPTQModel, QuantizeConfig

    described = QuantizeConfig.from_pretrained(str(checkpoint))
    if described.rotation:
        raise NotImplementedError(f"EoRA: no adapter can be made for `{checkpoint}`: {ROTATION}.")
    method = described.export_quant_method()
    backend = finished_backend(method)
    if isinstance(backend, str) and not isinstance(backend, BACKEND):
        raise NotImplementedError(f"EoRA: no adapter can be made for `{checkpoint}` ({method.value}): {backend}.")
    log.info("EoRA: loading the quantised checkpoint `%s`.", checkpoint)
    with uncompiled():
        quantized = GPTQModel.load(str(checkpoint), backend=backend, **loading)
    kernels = {name: module for name, module in quantized.model.named_modules() if isinstance(module, BaseQuantLinear)}
    if not kernels:
        raise ValueError(f"EoRA: `{checkpoint}` holds no quantised linear layer. Is it a quantised checkpoint?")
    config = copy.deepcopy(quantized.quantize_config)
    config.adapter = None
    # AWQ's scales are moved into weights in memory, which a model kept on disk does not have.
    config.offload_to_disk = config.offload_to_disk and method != METHOD.AWQ
    norms = {name: tensor.data for name, tensor in quantized.model.named_parameters() if tensor.ndim == 1}
    del quantized
    torch_empty_cache()
    return config, kernels, norms


def _check_same_model(model: Any, kernels: dict[str, BaseQuantLinear], checkpoint: Path, base: str) -> None:
    modules = dict(model.model.named_modules())
    for name, kernel in kernels.items():
        linear = modules.get(name)
        weight = getattr(linear, "weight", None)
        expected = (kernel.out_features, kernel.in_features)
        if weight is None or tuple(weight.shape) not in (expected, expected[::-1]):
            found = "no such module" if weight is None else f"a weight of {tuple(weight.shape)}"
            raise ValueError(
                f"EoRA: `{base}` is not the model that `{checkpoint}` was quantised from: {name} should be "
                f"{expected[0]} × {expected[1]}, found {found}. Name the full-precision base of the checkpoint."
            )
