"""Loading: a checkpoint's adapter is found, checked, and attached to its kernels."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from gptqmodel.adapter.adapter import Lora
from gptqmodel.nn_modules.qlinear import BaseQuantLinear

from ....adapter.ensemble.folder import EnsembleFolder
from ....adapter.errors import AdapterError, read_json
from ....adapter.folder import AdapterFolder
from ....adapter.naming import AdapterEntry, named_folder, read_entry
from ....formats import autoround
from ....formats.names import ADAPTER_DETAILS, MODEL_CONFIG, PLAN_MARK, QUANTIZE_CONFIG
from ....kernels.shared_input import share_inputs
from ....system.memory import release_free_memory
from ...ensemble import checkpoint_of, is_alone
from ..adapter import EoRA
from ..ensemble import attach_ensemble
from .save import adapted_kernels

log = logging.getLogger(__name__)

# Names of layers that some models make of several, gate and up or q, k and v.
JOINED_LAYERS = frozenset({"gate_up_proj", "qkv_proj"})
# Models whose experts AutoRound and GPTQModel take apart in different ways.
OTHER_ROWS = frozenset({"gpt_oss"})
_uncompiled: ContextVar[bool] = ContextVar("uncompiled", default=False)


def is_supported(original: Callable[..., bool], config: Any) -> bool:
    """Whether GPTQModel loads a model of this config as a quantised one; with the plugin also AutoRound's integers."""
    found = getattr(config, "quantization_config", None)
    if not isinstance(found, dict) or not autoround.is_autoround(found):
        return original(config)
    try:
        autoround.packing(found, str(getattr(config, "name_or_path", "")))
    except NotImplementedError:
        return original(config)
    return True


def config_from_pretrained(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Read a checkpoint's config.

    An adapter whose folder holds `eora.json` becomes an `EoRA`. A checkpoint that a plan made without an adapter gets
    an `EoRA()`, so that the plugin's kernels serve it. The config of AutoRound's checkpoint is translated into
    GPTQModel's terms, where there is no `quantize_config.json`.

    Raises:
        AdapterError: for an entry of the adapter in a form that cannot be.
        NotImplementedError: for AutoRound's checkpoint with layers that GPTQModel splits.
    """
    place = Path(args[0] if args else kwargs["save_dir"])
    _refuse_joined_layers(place)
    if not (place / QUANTIZE_CONFIG).is_file() and autoround.read_config(place) is not None:
        from gptqmodel import QuantizeConfig

        return QuantizeConfig.from_quant_config(autoround.quantize_config(place))
    # Read first for a clear message: GPTQModel fails with whatever exception a wrong entry happens to cause.
    entry = read_entry(place)
    config = original(*args, **kwargs)
    stock = config.adapter
    if stock is None and config.meta_get(PLAN_MARK):
        # It has no factors, and only says that the plugin's kernels are wanted.
        config.adapter = EoRA()
        return config
    source = getattr(stock, "_gptqmodel_checkpoint_source", None)
    if entry is not None and type(stock) is Lora and source is not None and _is_ours(place, entry):
        config.adapter = EoRA(rank=stock.rank, path=stock.path)
        config.adapter._gptqmodel_checkpoint_source = source
    return config


def _refuse_joined_layers(checkpoint: Path) -> None:
    """Refuse a checkpoint of AutoRound with layers that GPTQModel looks for apart, or apart in another way.

    It splits Phi-3's `gate_up_proj` in two before it quantises, and would tell that the weights of both are missing.
    Of GPT-OSS's it takes halves where AutoRound takes every second row, and would compute something else.

    Raises:
        NotImplementedError: naming the layers, and what opens the checkpoint.
    """
    if autoround.read_config(checkpoint) is None or not any(checkpoint.glob("*.safetensors")):
        return
    from gptqmodel.models import auto

    model_type = read_json(checkpoint / MODEL_CONFIG).get("model_type")
    if model_type in OTHER_ROWS:
        raise NotImplementedError(
            f"EoRA: `{checkpoint}` was packed by AutoRound, which splits the joined matrices of experts in models of "
            f"type {model_type} by every second row, and GPTQModel in halves: it would compute something else. "
            f"Quantise with GPTQModel."
        )
    definition = getattr(auto, "MODEL_MAP", {}).get(model_type)
    tree = repr(getattr(definition, "module_tree", None))
    packed = (key.removesuffix(".qweight") for key in autoround.tensor_shapes(checkpoint) if key.endswith(".qweight"))
    leaves = {name.rsplit(".", 1)[-1] for name in packed}
    joined = sorted(leaf for leaf in leaves & JOINED_LAYERS if definition is not None and leaf not in tree)
    if joined:
        raise NotImplementedError(
            f"EoRA: `{checkpoint}` has packed layers {', '.join(joined)}, which GPTQModel splits in models of type "
            f"{model_type} and cannot open as AutoRound writes them. Open it by transformers, with the adapter by "
            f"gptqmodel_eora_ext.load_peft, or quantise with GPTQModel."
        )


def _is_ours(checkpoint: Path, entry: AdapterEntry) -> bool:
    """Whether a checkpoint's adapter is one of this package; a folder that GPTQModel will refuse is not looked into."""
    try:
        return (named_folder(checkpoint, entry) / ADAPTER_DETAILS).is_file()
    except AdapterError:
        return False


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Have kernels that are loaded within the block not compiled.

    GPTQModel's torch kernel compiles its unpacking for every shape. Where each weight is unpacked only once, that takes
    more time than it saves.
    """
    token = _uncompiled.set(True)
    try:
        yield
    finally:
        _uncompiled.reset(token)


def attach_adapters(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Give every kernel its factors before GPTQModel initialises the kernels; then let those that read the same input
    be computed together.

    Raises:
        AdapterError: for an adapter that cannot be used, or whose shapes are not the checkpoint's.
    """
    kernels = adapted_kernels(model)
    if kernels:
        adapter = next(iter(kernels.values())).adapter
        if adapter.path and not adapter.kernels_alone:
            if EnsembleFolder.is_one(adapter.path):
                attach_ensemble(model, Path(adapter.path), kernels)
            else:
                _attach(AdapterFolder.open(adapter.path), kernels)
    if _uncompiled.get():
        for module in model.modules():
            if isinstance(module, BaseQuantLinear):
                module.optimized = True
    model = original(model, *args, **kwargs)
    share_inputs(kernels)
    return model


def load(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`GPTQModel.load`, which takes an ensemble's folder as well: its checkpoint is loaded, with the ensemble.

    Raises:
        AdapterError: for an ensemble whose checkpoint is not here.
        ValueError: for an ensemble beside another adapter, or to be quantised.
    """
    path = args[0] if args else kwargs.get("model_id_or_path")
    if not isinstance(path, (str, os.PathLike)) or not is_alone(Path(path)):
        return original(*args, **kwargs)
    if kwargs.get("adapter") is not None:
        raise ValueError(f"EoRA: `{path}` is an ensemble, and `adapter` names another adapter. Load the checkpoint "
                         f"with one of them: GPTQModel.load(CHECKPOINT, adapter=EoRA(path=…)).")  # fmt: skip
    if (args[1] if len(args) > 1 else kwargs.get("quantize_config")) is not None:
        raise ValueError(f"EoRA: `{path}` is an ensemble for a quantised checkpoint, which is not quantised again. "
                         f"Pass the full-precision model.")  # fmt: skip
    checkpoint, folder = checkpoint_of(Path(path))
    kwargs.pop("model_id_or_path", None)
    return original(str(checkpoint), *args[1:], **{**kwargs, "adapter": EoRA(path=folder)})


def from_quantized(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Load a checkpoint, and give the system back what is free then.

    The kernels have given up the packed tensors and the files' factors, and the host's loader lets go of the modules
    that they replaced when it returns. glibc would keep a quarter of the model's size of that.
    """
    loaded = original(*args, **kwargs)
    model = getattr(loaded, "model", None)
    if isinstance(model, torch.nn.Module) and adapted_kernels(model):
        release_free_memory()
    return loaded


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
                f"{folder.settings.base_model or 'another model'}; use it with that checkpoint."
            )
        kernel.adapter.attach(factors, kernel.runtime_device())
    without = len(kernels) - len(matched)
    log.info("EoRA: %d adapters attached from `%s`%s.", len(matched), folder.path,
             f", {without} modules have none" if without else "")  # fmt: skip


def adapters_off(model: Any) -> contextlib.AbstractContextManager[None]:
    """Have the kernels of a loaded model compute without their adapters within the block.

    Example:
        >>> with adapters_off(model):
        ...     plain = model(ids).logits
    """
    return with_adapter(model, None)


@contextlib.contextmanager
def with_adapter(model: Any, folder: Path | None) -> Iterator[None]:
    """Have the kernels of a loaded model compute with the adapter of a folder, or without any (None), within
    the block.

    Args:
        model: loaded with an adapter, or with `EoRA()`, which has the kernels take one.
        folder: of an adapter that was made for the checkpoint.

    Raises:
        AdapterError: for a folder that is no adapter, or one of another model.
        NotImplementedError: for kernels that take no adapter.
    """
    kernels = adapted_kernels(model)
    if folder is not None and not kernels:
        raise NotImplementedError(
            f"EoRA: `{folder}` cannot be put on this model: none of its kernels takes an adapter. Load it with one, "
            f"GPTQModel.load(path, adapter=EoRA(path=…))."
        )
    adapters = {name: kernel.adapter for name, kernel in kernels.items()}
    try:
        for kernel in kernels.values():
            kernel.adapter = None if folder is None else EoRA()
        if folder is not None:
            _attach(AdapterFolder.open(folder), kernels)
        yield
    finally:
        for name, kernel in kernels.items():
            kernel.adapter = adapters[name]
