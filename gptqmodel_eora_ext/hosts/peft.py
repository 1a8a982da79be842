"""An adapter on a loaded model by PEFT: to compute with where AutoRound's own kernels multiply, and to train."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..adapter.errors import AdapterError
from ..adapter.folder import AdapterFolder
from ..adapter.save import export_peft
from ..formats.autoround import tensor_shapes
from .seam import Seam, SeamError, Undo, undo_all

log = logging.getLogger(__name__)

# The package that AutoRound's kernels live in, and its parts whose kernels pass a gradient on to their input.
KERNELS = "auto_round_extension."
LEARNING_KERNELS = (f"{KERNELS}torch.", f"{KERNELS}triton.")
# Where the classes live that GPTQModel wraps transformers' models in.
WRAPPERS = "gptqmodel."
# Kernels that PEFT does not know, or keeps `qweight` of, which ours have given up for their own form.
UNKNOWN_TO_PEFT = (KERNELS, f"{__package__.partition('.')[0]}.")
# What stands in a path before the number of an expert.
EXPERTS = ".experts."
# What a packed weight's name in a checkpoint ends with.
PACKED = ".qweight"


def load_peft(model: Any, path: str | Path, *, is_trainable: bool = False) -> Any:
    """Put an adapter on a quantised model by PEFT, to compute with it or to train it.

    PEFT by itself knows GPTQModel's kernels but not AutoRound's own, and it adds to what a kernel gives, whether or not
    that holds an adapter already. Here an adapter that `GPTQModel.load` attached is taken off first.

    The model that is trained is a `PeftModel` like any other: `transformers.Trainer` and trl's `SFTTrainer` take it,
    and what its `save_pretrained` writes loads wherever a plain PEFT adapter does.

    Args:
        model: as transformers or `GPTQModel.load` gives it.
        path: the adapter's folder. To compute with, its factors in 16 or 32 bits; to train, packed ones, too, which
            are unpacked for it (and packed again by `eora export --packed`).
        is_trainable: whether the factors get gradients. Everything else stays frozen.

    Returns:
        The `PeftModel`; it keeps the factors in float32 and adds (x Aᵀ) Bᵀ to what each kernel gives. Training takes 16
        bytes for a value of the factors: itself, its gradient and Adam's two moments.

    Raises:
        AdapterError: for a folder that is no adapter, one with values that cannot be, one of packed factors, which
            PEFT cannot hold, where they are not to be trained, or one of a checkpoint with quantised experts where
            transformers keeps experts in one tensor.
        ValueError: where a kernel gives no gradients, before anything is changed; the message names one that does.

    Example:
        >>> model = load_peft(GPTQModel.load("out"), "out/eora", is_trainable=True)
        >>> SFTTrainer(model=model, train_dataset=data).train()
        >>> model.save_pretrained("out/finetuned")
    """
    folder = AdapterFolder.open(path)
    if type(model).__module__.startswith(WRAPPERS):
        model = model.model
    _check_experts(model, folder)
    if is_trainable:
        _check_gradients(model)
    elif folder.is_packed:
        raise AdapterError(
            f"Adapter: `{path}` has factors in {folder.factor_bits} bits, which PEFT cannot hold. Make a plain copy: "
            f"eora export {path} --peft FOLDER"
        )
    _take_off(model)
    if not folder.is_packed:
        return _put_on(model, folder, is_trainable)
    with tempfile.TemporaryDirectory() as scratch:
        export_peft(folder, Path(scratch) / folder.path.name)
        return _put_on(model, AdapterFolder.open(Path(scratch) / folder.path.name), is_trainable)


def _put_on(model: torch.nn.Module, folder: AdapterFolder, is_trainable: bool) -> Any:
    import peft
    from peft.tuners.lora.gptq import GPTQLoraLinear

    config = peft.PeftConfig.from_pretrained(str(folder.path))
    modules = [module for module in model.modules() if type(module).__module__.startswith(UNKNOWN_TO_PEFT)]
    if modules:
        # PEFT's way for layers it does not know. Its layer for GPTQ kernels adds the product to whatever they give.
        config._register_custom_module({type(module): GPTQLoraLinear for module in modules})
    with contextlib.ExitStack() as stack:
        if any(EXPERTS in module for module in folder.keys):
            stack.enter_context(_modules_as_they_are())
        made = peft.PeftModel.from_pretrained(model, str(folder.path), config=config, is_trainable=is_trainable)
    for module in modules:
        # PEFT has asked for `qweight` to learn the device.
        if callable(tell := getattr(module, "only_looked_at", None)):
            tell()
    return made


def _check_gradients(model: torch.nn.Module) -> None:
    """Refuse kernels that pass no gradient on; have transformers take AutoRound's that do.

    Raises:
        ValueError: naming the module and its kernel.
    """
    for name, module in model.named_modules():
        kernel = type(module)
        if getattr(kernel, "SUPPORTS_TRAINING", True) is False:
            raise ValueError(
                f"EoRA: {name} is multiplied by {kernel.__name__}, which gives no gradients. Load the checkpoint to "
                f"train on with a kernel that does: GPTQModel.load(…, backend=BACKEND.GPTQ_TORCH), or "
                f"BACKEND.AWQ_TORCH for AWQ."
            )
        if kernel.__module__.startswith(KERNELS) and not kernel.__module__.startswith(LEARNING_KERNELS):
            raise ValueError(
                f"EoRA: {name} is multiplied by {kernel.__module__}, which gives no gradients. Load the checkpoint to "
                f'train on with quantization_config=AutoRoundConfig(backend="torch").'
            )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and type(quantizer).__name__ == "AutoRoundQuantizer" and not quantizer.is_trainable:
        # Transformers says so of all that AutoRound made, whatever multiplies, and its Trainer refuses on its word.
        quantizer.__class__ = type("TrainableAutoRoundQuantizer", (type(quantizer),), {"is_trainable": True})


def _take_off(model: torch.nn.Module) -> None:
    """Take the adapter off that GPTQModel attached, which would be added beside the new one."""
    worn = [module for module in model.modules() if getattr(module, "adapter", None) is not None
            and hasattr(module, "in_features") and hasattr(module, "bits")]  # fmt: skip
    for module in worn:
        module.adapter = None  # type: ignore[assignment]
    if worn:
        log.info("EoRA: the adapter that %d modules had from loading is taken off.", len(worn))


def _check_experts(model: torch.nn.Module, folder: AdapterFolder) -> None:
    """Refuse experts that are no modules: PEFT would leave their factors out, and transformers has made them up.

    An adapter may have no factors for any expert, where other modules were worth more. So it is also looked whether the
    checkpoint that the model was read from holds quantised experts.

    Raises:
        AdapterError: naming the module and the model type.
    """
    joined = EXPERTS.rstrip(".")
    tensors = {name.rpartition(".")[0]: name for name, one in model.named_parameters() if one.ndim == 3}
    tensor = next((name for block, name in tensors.items() if block.endswith(joined)), None)
    if tensor is None:
        return
    for module in (*folder.keys, *_packed_modules(model)):
        if EXPERTS in module:
            raise AdapterError(
                f"Adapter: `{folder.path}` is for a checkpoint with quantised experts, {module} for instance, and "
                f"transformers has the experts of models of type "
                f"{getattr(getattr(model, 'config', None), 'model_type', 'unknown')} in one tensor ({tensor}), into "
                f"which it reads no quantised ones: it makes them up. Open the checkpoint with GPTQModel.load."
            )


def _packed_modules(model: torch.nn.Module) -> list[str]:
    """Modules of packed integers in the checkpoint that a model was read from; none where it is not on this machine."""
    named = str(getattr(model, "name_or_path", ""))
    if not named:
        return []
    try:
        place = Path(named) if Path(named).is_dir() else Path(snapshot_download(named, local_files_only=True))
        return [key.removesuffix(PACKED) for key in tensor_shapes(place) if key.endswith(PACKED)]
    except (OSError, ValueError):
        return []


@contextlib.contextmanager
def _modules_as_they_are() -> Iterator[None]:
    """Have PEFT take the modules that an adapter names, within the block.

    For mixtures of experts it renames those of experts to tensors of all experts, which a model has as long as it is
    not quantised. The two functions that do so are the plugin's seams into PEFT; older releases do not have them.

    Raises:
        SeamError: when one of them takes other arguments than it did.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        yield
        return
    undo: list[Undo] = []
    try:
        for seam in (
            Seam(conversion, "convert_peft_config_for_transformers", ("peft_config",), lambda original: _no_change),
            Seam(
                conversion, "convert_peft_adapter_state_dict_for_transformers", ("adapter_state_dict",),
                lambda original: _unchanged,
            ),
        ):  # fmt: skip
            if hasattr(seam.owner, seam.name):
                if problem := seam.problem():
                    raise SeamError(f"An adapter of experts cannot be put on by this PEFT: {problem}.")
                undo.append(seam.apply())
        yield
    finally:
        undo_all(undo)


def _no_change(*args: Any, **kwargs: Any) -> None:
    """The adapter's settings stay as they are."""


def _unchanged(*args: Any, adapter_state_dict: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
    return adapter_state_dict
