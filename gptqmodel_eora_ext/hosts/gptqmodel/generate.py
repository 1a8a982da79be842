"""`GPTQModel.adapter.generate(adapter=EoRA(…), …)`: an adapter for a checkpoint that is already quantised."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization.config import METHOD
from gptqmodel.utils.backend import BACKEND
from gptqmodel.utils.torch import torch_empty_cache

from ..peft import save_adapter, uniform_rank
from .adapter import EoRA
from .checkpoint import DEFAULT_FOLDER, name_adapter
from .quantize import RUN_ATTRIBUTE, CompensatingLooper, logs_out_of_the_way
from .run import CompensationRun
from .weights import CheckpointProcessor

log = logging.getLogger(__name__)

# Kernels that dequantise on any device, by the checkpoint's method.
TORCH_BACKENDS = {METHOD.GPTQ: BACKEND.GPTQ_TORCH, METHOD.AWQ: BACKEND.AWQ_TORCH}


def generate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make an EoRA adapter for a finished checkpoint; any other adapter goes to `original`.

    The signature is GPTQModel's. `adapter.path` is where to write; a relative path counts from the working directory;
    left out, the adapter goes into the checkpoint, which then names it.
    """
    call = inspect.signature(original).bind(*args, **kwargs)
    call.apply_defaults()
    options = call.arguments
    adapter = options["adapter"]
    if not isinstance(adapter, EoRA):
        return original(*args, **kwargs)
    dataset = options["calibration_dataset"]
    if dataset is None or len(dataset) == 0:
        raise ValueError("EoRA: the calibration dataset is empty. Pass texts or token ids.")
    checkpoint = Path(options["quantized_model_id_or_path"])
    folder = Path(adapter.path) if adapter.path else checkpoint / DEFAULT_FOLDER
    if not adapter.path and not os.access(checkpoint, os.W_OK):
        raise ValueError(f"EoRA: cannot write into `{checkpoint}`. Name a folder: EoRA(rank=…, path=…).")
    CompensationRun(adapter, None, method="checked before anything is loaded")
    with logs_out_of_the_way():
        return _generate(adapter, checkpoint, folder, options)


def _generate(adapter: EoRA, checkpoint: Path, folder: Path, options: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel

    loading = {key: options[key] for key in ("trust_remote_code", "dtype", "device") if options[key] is not None}
    config, kernels = _load_kernels(checkpoint, loading)
    log.info("EoRA: loading the full-precision model `%s`.", options["model_id_or_path"])
    model = GPTQModel.load(options["model_id_or_path"], quantize_config=config, **loading)
    _check_same_model(model, kernels, checkpoint, options["model_id_or_path"])
    run = CompensationRun(adapter, config.dynamic, method=str(config.method.value))
    setattr(model, RUN_ATTRIBUTE, run)
    processor = CheckpointProcessor(
        kernels,
        tokenizer=options["tokenizer"] or model.tokenizer,
        qcfg=config,
        calibration=options["calibration_dataset"],
        prepare_dataset_func=model.prepare_dataset,
        calibration_concat_size=options["calibration_dataset_concat_size"],
        calibration_sort=options["calibration_dataset_sort"],
        calibration_concat_separator=options["calibration_concat_separator"],
        batch_size=options["batch_size"],
    )
    CompensatingLooper(model, processors=[processor]).loop()
    save_adapter(
        folder,
        run.factors,
        base_model=str(checkpoint),
        module_names=[name for name, _ in model.model.named_modules()],
        details=run.details(),
    )
    if folder.resolve().is_relative_to(checkpoint.resolve()):
        name_adapter(checkpoint, folder, uniform_rank(run.factors))
    log.info("EoRA: %d adapters written to `%s`.", len(run.factors), folder)


def _load_kernels(checkpoint: Path, loading: dict[str, Any]) -> tuple[Any, dict[str, BaseQuantLinear]]:
    """The checkpoint's config and its quantised linears; the rest of the model is dropped."""
    from gptqmodel import GPTQModel, QuantizeConfig

    method = QuantizeConfig.from_pretrained(str(checkpoint)).export_quant_method()
    if method not in TORCH_BACKENDS:
        raise NotImplementedError(
            f"EoRA: `{checkpoint}` is quantised by `{method}`; adapters can be generated for "
            f"{', '.join(str(known.value) for known in TORCH_BACKENDS)} checkpoints."
        )
    log.info("EoRA: loading the quantised checkpoint `%s`.", checkpoint)
    quantized = GPTQModel.load(str(checkpoint), backend=TORCH_BACKENDS[method], **loading)
    kernels = {
        name: module for name, module in quantized.model.named_modules() if isinstance(module, BaseQuantLinear)
    }
    if not kernels:
        raise ValueError(f"EoRA: `{checkpoint}` holds no quantised linear layer. Is it a quantised checkpoint?")
    config = copy.deepcopy(quantized.quantize_config)
    config.adapter = None
    del quantized
    torch_empty_cache()
    return config, kernels


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
