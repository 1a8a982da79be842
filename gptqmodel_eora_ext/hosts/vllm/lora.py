"""Adapters that requests choose by vLLM's own LoRA requests, beside the one that belongs to the checkpoint.

An adapter that was made for the bare checkpoint (its folder holds `eora.json`) takes the place of the checkpoint's own
for the requests that wear it: both mend the same error, and would mend it twice together. Any other LoRA is added to
the model as it is served, as everywhere in vLLM.

vLLM adds LoRAs to a layer's output by kernels of its own, row by row. Where all rows of a batch wear the same adapter
of the first kind, on a CPU, the plugin's kernels multiply it together with the weight instead. Where rows differ, those
that wear one are multiplied without the checkpoint's own adapter, and vLLM adds theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...adapter.errors import AdapterError
from ...adapter.folder import AdapterFolder
from ...formats.factors import Factors
from ...formats.names import ADAPTER_DETAILS
from ...kernels.cpu.repack import repack_factors
from .checkpoint import check_adapter
from .linear import KNOWN_LAYERS
from .served import Groups, ServedLinear

# vLLM's layers with LoRAs over the plugin's, by the names that traces hold (`ops`).
_wrappers: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


@dataclass
class Worn:
    """What the rows of the batch under way wear; one for each of vLLM's LoRA managers.

    Attributes:
        flags: whether the adapter in each slot takes the place of the checkpoint's own; the last stands for none. On
            the device, and written in place, so that a captured graph reads what is true when it is replayed.
        alone: slot and adapter that all rows wear, where it takes that place.
        any: whether some row wears such an adapter.
    """

    flags: torch.Tensor
    alone: tuple[int, Any] | None = None
    any: bool = False
    # Slot → the adapter that a layer's factors were taken from, and what multiplies them; by layer.
    fused: weakref.WeakKeyDictionary[ServedLinear, dict[int, tuple[Any, Groups]]] = field(
        default_factory=weakref.WeakKeyDictionary
    )


def load_adapter(original: Callable[..., Any], manager: Any, lora_request: Any) -> Any:
    """Load an adapter; one that was made for the bare checkpoint is checked and marked.

    Raises:
        AdapterError: for packed factors, an adapter of another model, or a broken one.
        NotImplementedError: where vLLM cuts LoRAs in a way that the plugin does not follow.
    """
    place = _place(lora_request)
    model = manager._adapter_manager.model
    served = [one for module in model.modules() if (one := getattr(module, "_eora_served", None)) is not None]
    if not served or not (place / ADAPTER_DETAILS).is_file():
        return original(manager, lora_request)
    folder = AdapterFolder.open(place)
    if folder.is_packed:
        raise AdapterError(
            f"Adapter: `{place}` has factors in {folder.factor_bits} bits, which vLLM's LoRA requests cannot hold. "
            f"Make a plain copy: eora export {place} --peft FOLDER. A checkpoint's own adapter may be packed."
        )
    check_adapter(folder, served[0].checkpoint.modules)
    if manager.lora_config.fully_sharded_loras:
        raise NotImplementedError(
            f"EoRA: `{place}` takes the place of the checkpoint's own adapter, which --fully-sharded-loras does not "
            f"allow. Serve without that option."
        )
    unknown = _unknown_layer(model)
    if unknown is not None:
        raise NotImplementedError(
            f"EoRA: `{place}` takes the place of the checkpoint's own adapter, which is not known here of a {unknown}: "
            f"that layer adds LoRAs in a way of its own. Name the adapter in the checkpoint's quantize_config.json."
        )
    loaded = original(manager, lora_request)
    loaded.takes_place_of_own = True
    return loaded


def _place(lora_request: Any) -> Path:
    from vllm.lora.utils import get_adapter_absolute_path

    return Path(get_adapter_absolute_path(lora_request.lora_path))


def _unknown_layer(model: torch.nn.Module) -> str | None:
    """The class of a layer whose way of adding LoRAs is its own, if there is one."""
    layers = (type(module) for module in model.modules() if hasattr(module, "_eora_served"))
    return next((layer.__name__ for layer in layers if layer not in KNOWN_LAYERS), None)


def set_adapter_mapping(original: Callable[..., Any], manager: Any, mapping: Any) -> Any:
    """Take note of what the rows of the next batch wear."""
    result = original(manager, mapping)
    worn = _worn(manager)
    slots = manager.lora_index_to_id
    adapters = [None if one is None else manager._registered_adapters.get(one) for one in slots]
    replacing = [getattr(one, "takes_place_of_own", False) for one in adapters]
    worn.flags.copy_(torch.tensor([*replacing, False]))
    ids = set(mapping.index_mapping)
    places = {slots.index(one) if one > 0 and one in slots else -1 for one in ids}
    worn.any = any(place >= 0 and replacing[place] for place in places)
    only = next(iter(places)) if len(places) == 1 else -1
    worn.alone = (only, adapters[only]) if only >= 0 and replacing[only] else None
    return result


def _worn(manager: Any) -> Worn:
    """What a manager's rows wear; made, and made known to its layers, when it is first asked for."""
    if not hasattr(manager, "_eora_worn"):
        device = next(iter(manager.punica_wrapper_mapping.values())).device
        manager._eora_worn = Worn(torch.zeros(manager.lora_slots + 1, dtype=torch.bool, device=device))
        for module in manager.modules.values():
            base = getattr(module, "base_layer", None)
            if hasattr(base, "_eora_served"):
                module._eora_worn = manager._eora_worn
                _wrappers[base._eora_name] = module
    worn: Worn = manager._eora_worn
    return worn


def apply(original: Callable[..., Any], wrapper: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """y of a layer with LoRAs."""
    base = wrapper.base_layer
    served: ServedLinear | None = getattr(base, "_eora_served", None)
    if served is None or not hasattr(wrapper, "_eora_worn"):
        return original(wrapper, x, bias)
    if torch.compiler.is_compiling():
        y = served_with_loras(x, base._eora_name, served.out_features)
    else:
        y = multiply(wrapper, x)
    return y if bias is None or served.adds_bias else y + bias


def multiply(wrapper: Any, x: torch.Tensor) -> torch.Tensor:
    """y of a layer with LoRAs, without a bias that the plugin's layer does not add itself.

    Args:
        wrapper: vLLM's layer with LoRAs, over one of the plugin's.
        x: … × in.
    """
    served: ServedLinear = wrapper.base_layer._eora_served
    worn: Worn = wrapper._eora_worn
    if served.device.type == "cpu":
        if not worn.any:
            return wrapper._apply_lora_to_output(x, served(x))
        if worn.alone is not None and wrapper.n_slices == len(served.parts):
            return served.with_groups(x, _fused(worn, wrapper, served, *worn.alone))
    # Which rows wear what is read on the device, so that a captured graph serves any batch.
    indices = wrapper.punica_wrapper._token_lora_indices[: x.numel() // x.shape[-1]]
    replaced = worn.flags[indices].view(*x.shape[:-1], 1)
    return wrapper._apply_lora_to_output(x, torch.where(replaced, served.bare(x), served(x)))


@torch.library.custom_op("gptqmodel_eora_ext::served_with_loras", mutates_args=())
def served_with_loras(x: torch.Tensor, name: str, out_features: int) -> torch.Tensor:
    """y of a layer with LoRAs, … × out, of x, … × in."""
    return multiply(_wrappers[name], x)


@served_with_loras.register_fake
def _(x: torch.Tensor, name: str, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _fused(worn: Worn, wrapper: Any, served: ServedLinear, slot: int, adapter: Any) -> Groups:
    """What multiplies the layer with the adapter in a slot; made when it is first worn."""
    known = worn.fused.setdefault(served, {})
    if slot not in known or known[slot][0] is not adapter:
        pairs = [_factors(down[slot, 0], up[slot, 0])
                 for down, up in zip(wrapper.lora_a_stacked, wrapper.lora_b_stacked, strict=True)]  # fmt: skip
        known[slot] = (adapter, served.groups([None if one is None else repack_factors(one) for one in pairs]))
    return known[slot][1]


def _factors(down: torch.Tensor, up: torch.Tensor) -> Factors | None:
    """A and B as vLLM keeps them, filled up with zeros to its largest rank, without the zeros; None where all are."""
    used = down.any(dim=1).nonzero()
    if not len(used):
        return None
    rank = int(used[-1]) + 1
    return Factors(down[:rank].clone(), up[:, :rank].T.contiguous())

