"""Adapters that requests choose by vLLM's own LoRA requests, beside the one that belongs to the checkpoint.

An adapter that was made for the bare checkpoint (its folder holds `eora.json`) takes the place of the checkpoint's own
for the requests that wear it: both mend the same error, and would mend it twice together. Any other LoRA is added to
the model as it is served, as everywhere in vLLM.

On a CPU the rows of a batch are multiplied adapter by adapter. One that takes the place of the checkpoint's own goes
through the plugin's kernels together with the weight, as that does; another is added by torch. vLLM's own operators are
not used: on a CPU they copy A and B for every row, and give rows without an adapter that of the last slot
(https://github.com/vllm-project/vllm/pull/48421).

On a GPU vLLM's kernels add the adapters of all rows at once, to a product without the checkpoint's own for those rows
that wear one in its place. That part was written without a GPU and has not been run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.lora.utils import get_adapter_absolute_path

from ...adapter.errors import AdapterError
from ...adapter.folder import AdapterFolder
from ...formats.factors import Factors
from ...formats.names import ADAPTER_DETAILS
from ...kernels.cpu.factors import repack_factors
from .checkpoint import check_adapter
from .linear import KNOWN_LAYERS
from .ops import define
from .served import Groups, ServedLinear

# vLLM's layers with LoRAs over the plugin's, by the names that traces hold (`ops`).
_wrappers: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


# The adapter that this was made from; what multiplies a layer with it in place of its own; A and B of each part.
Made = tuple[Any, Groups | None, list[Factors | None]]


@dataclass(frozen=True)
class Rows:
    """Rows of a batch that wear the same.

    Attributes:
        slot: where vLLM keeps A and B; −1 for no adapter beside the checkpoint's own.
        adapter: vLLM's object of the adapter; None for none.
        in_place: whether it takes the place of the checkpoint's own.
        places: int64, which rows; None for all.
    """

    slot: int
    adapter: Any
    in_place: bool
    places: torch.Tensor | None


@dataclass
class Worn:
    """What the rows of the batch under way wear; one for each of vLLM's LoRA managers.

    Attributes:
        flags: whether the adapter in each slot takes the place of the checkpoint's own; the last stands for none. On
            the device, and written in place, so that a captured graph reads what is true when it is replayed.
        rows: the batch's rows by what they wear.
        count: how many there are.
        factors: layer → slot → what was made of the adapter there when it was first worn.
    """

    flags: torch.Tensor
    rows: list[Rows] = field(default_factory=list)
    count: int = 0
    factors: weakref.WeakKeyDictionary[ServedLinear, dict[int, Made]] = field(default_factory=weakref.WeakKeyDictionary)


def load_adapter(original: Callable[..., Any], manager: Any, lora_request: Any) -> Any:
    """Load an adapter; one that was made for the bare checkpoint is checked and marked.

    Raises:
        AdapterError: for packed factors, an adapter of another model, or a broken one.
        NotImplementedError: where vLLM cuts LoRAs in a way that the plugin does not follow.
    """
    place = Path(get_adapter_absolute_path(lora_request.lora_path))
    layers = [module for module in manager._adapter_manager.model.modules() if hasattr(module, "_eora_served")]
    if not layers or not (place / ADAPTER_DETAILS).is_file():
        return original(manager, lora_request)
    folder = AdapterFolder.open(place)
    if folder.is_packed:
        raise AdapterError(
            f"Adapter: `{place}` has factors in {folder.factor_bits} bits, which vLLM's LoRA requests cannot hold. "
            f"Make a plain copy: eora export {place} --peft FOLDER. A checkpoint's own adapter may be packed."
        )
    check_adapter(folder, layers[0]._eora_served.checkpoint.modules)
    _check_replaceable(place, layers, manager)
    loaded = original(manager, lora_request)
    loaded.takes_place_of_own = True
    return loaded


def _check_replaceable(place: Path, layers: Sequence[Any], manager: Any) -> None:
    """Refuse a server in which the checkpoint's own adapter cannot be left out for single rows.

    Raises:
        NotImplementedError: naming the option or the layer.
    """
    what = f"EoRA: `{place}` takes the place of the checkpoint's own adapter, which"
    if manager.lora_config.fully_sharded_loras:
        raise NotImplementedError(f"{what} --fully-sharded-loras does not allow. Serve without that option.")
    wrapped = {id(getattr(module, "base_layer", None)) for module in manager._adapter_manager.modules.values()}
    for layer in layers:
        if not any(part.factors is not None for part in layer._eora_served.parts):
            continue
        if id(layer) not in wrapped:
            raise NotImplementedError(
                f"{what} stays on {layer.prefix}, to which vLLM adds no LoRA here. Serve without "
                f"--lora-target-modules, or name all of the checkpoint's modules there."
            )
        if type(layer) not in KNOWN_LAYERS:
            raise NotImplementedError(
                f"{what} cannot be left out of {layer.prefix}: a {type(layer).__name__} adds LoRAs in its own way. "
                f"Name the adapter in the checkpoint's quantize_config.json instead."
            )


def set_adapter_mapping(original: Callable[..., Any], manager: Any, mapping: Any) -> Any:
    """Take note of what the rows of the next batch wear."""
    result = original(manager, mapping)
    worn = _worn(manager)
    slots = {number: slot for slot, number in enumerate(manager.lora_index_to_id) if number is not None}
    adapters = {slot: manager._registered_adapters.get(number) for number, slot in slots.items()}
    in_place = {slot: bool(getattr(one, "takes_place_of_own", False)) for slot, one in adapters.items()}
    worn.flags.copy_(torch.tensor([*(in_place.get(slot, False) for slot in range(len(worn.flags) - 1)), False]))
    numbers = torch.tensor(mapping.index_mapping, dtype=torch.int64)
    worn.count = len(numbers)
    found = numbers.unique().tolist()
    worn.rows = []
    for number in found:
        slot = slots.get(number, -1)
        places = None if len(found) == 1 else (numbers == number).nonzero().flatten()
        worn.rows.append(Rows(slot, adapters.get(slot), in_place.get(slot, False), places))
    return result


def _worn(manager: Any) -> Worn:
    """What a manager's rows wear; made, and made known to its layers, when it is first asked for."""
    if not hasattr(manager, "_eora_worn"):
        device = torch.device(next(iter(manager.punica_wrapper_mapping.values())).device)
        manager._eora_worn = Worn(torch.zeros(manager.lora_slots + 1, dtype=torch.bool, device=device))
        for module in manager.modules.values():
            base: Any = getattr(module, "base_layer", None)
            if base is not None and hasattr(base, "_eora_served"):
                module._eora_worn = manager._eora_worn
                if device.type != "cpu":
                    base._eora_served.prepare_bare()
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
        return _by_adapter(wrapper, served, worn, x)
    # Which rows wear what is read on the device, so that a captured graph serves any batch.
    indices = wrapper.punica_wrapper._token_lora_indices[: x.numel() // x.shape[-1]]
    in_place = worn.flags[indices].view(*x.shape[:-1], 1)
    return wrapper._apply_lora_to_output(x, torch.where(in_place, served.bare(x), served(x)))


def _by_adapter(wrapper: Any, served: ServedLinear, worn: Worn, x: torch.Tensor) -> torch.Tensor:
    """y, … × out, adapter by adapter."""
    rows = x.reshape(-1, served.in_features)
    if len(worn.rows) == 1 and worn.rows[0].places is None:
        y = _wearing(wrapper, served, worn, worn.rows[0], rows)
        return y.view(*x.shape[:-1], served.out_features)
    if worn.count != len(rows):
        raise RuntimeError(
            f"EoRA: vLLM told the adapters of {worn.count} rows, and multiplies {len(rows)}. Is it a version that was "
            f"not tested? One adapter for all requests is served by any."
        )
    y = rows.new_empty(len(rows), served.out_features)
    for same in worn.rows:
        y[same.places] = _wearing(wrapper, served, worn, same, rows[same.places])
    return y.view(*x.shape[:-1], served.out_features)


def _wearing(wrapper: Any, served: ServedLinear, worn: Worn, same: Rows, x: torch.Tensor) -> torch.Tensor:
    """y of rows that wear the same."""
    if same.slot < 0:
        return served(x)
    known = worn.factors.setdefault(served, {})
    if same.slot not in known or known[same.slot][0] is not same.adapter:
        pairs = [_factors(down[same.slot, 0], up[same.slot, 0])
                 for down, up in zip(wrapper.lora_a_stacked, wrapper.lora_b_stacked, strict=True)]  # fmt: skip
        # A part that vLLM sees as several has factors that its kernel cannot take.
        fused = same.in_place and len(pairs) == len(served.parts)
        repacked = [None if one is None else repack_factors(one) for one in pairs] if fused else []
        known[same.slot] = (same.adapter, served.groups(repacked) if fused else None, [] if fused else pairs)
    _, groups, pairs = known[same.slot]
    if groups is not None:
        return served.with_groups(x, groups)
    y = served.bare(x) if same.in_place else served(x)
    begin = 0
    for pair, width in zip(pairs, wrapper.output_slices, strict=True):
        if pair is not None:
            down, up = pair.dense(x.dtype)
            y[:, begin : begin + width] += (x @ down.T) @ up
        begin += width
    return y


def _served_with_loras(x: torch.Tensor, name: str, out_features: int) -> torch.Tensor:
    return multiply(_wrappers[name], x)


served_with_loras = define("served_with_loras", _served_with_loras)


def _factors(down: torch.Tensor, up: torch.Tensor) -> Factors | None:
    """A and B as vLLM keeps them, filled up with zeros to its largest rank, without the zeros; None where all are."""
    used = down.any(dim=1).nonzero()
    if not len(used):
        return None
    rank = int(used[-1]) + 1
    return Factors(down[:rank].clone(), up[:, :rank].T.contiguous())

