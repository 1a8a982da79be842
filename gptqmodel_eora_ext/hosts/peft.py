"""An adapter over a model that transformers loaded with AutoRound's own inference kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..adapter.errors import AdapterError
from ..adapter.folder import AdapterFolder
from ..formats.autoround import tensor_shapes
from .seam import Seam, SeamError, Undo, undo_all

# The package that AutoRound's kernels live in.
KERNELS = "auto_round_extension."
# What stands in a path before the number of an expert.
EXPERTS = ".experts."
# What a packed weight's name in a checkpoint ends with.
PACKED = ".qweight"


def load_peft(model: torch.nn.Module, path: str | Path) -> Any:
    """Put an adapter on a model by PEFT, which knows GPTQModel's kernels but not AutoRound's own.

    Models with other kernels work too.

    Args:
        model: as transformers gives it.
        path: the adapter's folder, its factors in 16 or 32 bits.

    Returns:
        The `PeftModel`; it keeps the factors in float32 and adds (x Aᵀ) Bᵀ to what each kernel gives.

    Raises:
        AdapterError: for a folder that is no adapter, one with values that cannot be, one of packed factors, which
            PEFT cannot hold, or one of a checkpoint with quantised experts where transformers keeps experts in one
            tensor.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("out", dtype="auto")
        >>> model = load_peft(model, "out/eora")
    """
    import peft
    from peft.tuners.lora.gptq import GPTQLoraLinear

    folder = AdapterFolder.open(path)
    _check_experts(model, folder)
    if folder.is_packed:
        raise AdapterError(
            f"Adapter: `{path}` has factors in {folder.factor_bits} bits, which PEFT cannot hold. Make a plain copy: "
            f"eora export {path} --peft FOLDER"
        )
    config = peft.PeftConfig.from_pretrained(str(folder.path))
    kernels = {type(module) for module in model.modules() if type(module).__module__.startswith(KERNELS)}
    if kernels:
        # PEFT's way for layers it does not know. Its layer for GPTQ kernels adds the product to whatever they give.
        config._register_custom_module(dict.fromkeys(kernels, GPTQLoraLinear))
    if not any(EXPERTS in module for module in folder.keys):
        return peft.PeftModel.from_pretrained(model, str(folder.path), config=config)
    with _modules_as_they_are():
        return peft.PeftModel.from_pretrained(model, str(folder.path), config=config)


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


@contextmanager
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
