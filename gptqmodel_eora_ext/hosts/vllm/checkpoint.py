"""What a checkpoint holds for vLLM, read from the headers of its files and checked before a server starts.

vLLM makes its configuration in the process that the user started, and sends it to those that load the model. So what is
refused here is refused in the first seconds, by the process that the user looks at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ...adapter.errors import AdapterError
from ...adapter.folder import AdapterFolder
from ...adapter.naming import named_folder, read_entry
from ...formats import autoround
from ...formats.names import PLAN_MARK, QUANTIZE_CONFIG
from ...formats.packed_weights import WEIGHT_BITS, words

# Tensors of a packed module, by the ends of their names; `g_idx` may be missing.
PACKED = ("qweight", "qzeros", "scales", "g_idx")
# vLLM joins all experts of a layer to one, whose methods are others than those of linear layers.
EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")
GPTQ = "gptq"
# GPTQModel's name of the layout that stores zeros as they are; the other, and older packers, store them less one.
VERSION_2 = "gptq_v2"
# What stock vLLM multiplies: bits of a symmetric checkpoint, in the order of its inputs.
STOCK_BITS = (4, 8)


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message tells what was found and what would do."""


@dataclass(frozen=True)
class ModuleHeader:
    """A packed module, as the headers of the checkpoint's files describe it.

    Attributes:
        bits: of a code.
        in_features, out_features: of the whole module.
        group_size: inputs per scale, −1 for a whole row.
        tensors: which of `PACKED` there are.
    """

    bits: int
    in_features: int
    out_features: int
    group_size: int
    tensors: frozenset[str]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is served.

    Attributes:
        folder: where it lies.
        modules: packed modules, by the names that the files have.
        dense: modules with a plain `weight` matrix, likewise.
        stores_zero_minus_one: whether `qzeros` are of version 1.
        adapter: folder of its adapter; None for none.
    """

    folder: Path
    modules: Mapping[str, ModuleHeader]
    dense: frozenset[str]
    stores_zero_minus_one: bool
    adapter: Path | None
    _matched: dict[str, str] = field(default_factory=dict)

    @cached_property
    def adapter_folder(self) -> AdapterFolder | None:
        """The adapter, opened."""
        return None if self.adapter is None else AdapterFolder.open(self.adapter)

    def adapter_name(self, module: str) -> str | None:
        """What the adapter's file calls a module; None where it has no factors for it."""
        return self._matched.get(module)

    def __getstate__(self) -> dict[str, Any]:
        """What other processes are sent: the opened folder is opened there anew."""
        return {name: value for name, value in self.__dict__.items() if name != "adapter_folder"}


def is_gptq(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of packed integers in GPTQ's layout, AutoRound's exports included."""
    if autoround.is_autoround(config):
        try:
            return autoround.packing(config, "checkpoint").method == GPTQ
        except NotImplementedError:
            return False
    return str(config.get("quant_method", config.get("method"))).lower() == GPTQ


def needs_plugin(config: Mapping[str, Any]) -> bool:
    """Whether stock vLLM would refuse a checkpoint in GPTQ layout for its weights, or compute something else.

    Args:
        config: its `quantization_config`.
    """

    def stock(own: Mapping[str, Any]) -> bool:
        ordered = not own.get("desc_act") or own.get("group_size") == -1
        return own.get("bits") in STOCK_BITS and own.get("sym", True) is not False and ordered

    dynamic = config.get("dynamic") or {}
    positive = [own for name, own in dynamic.items() if not name.startswith("-:") and isinstance(own, dict)]
    changes = [{**config, **own} for own in positive]
    mixed = any(own.get("bits") != config.get("bits") for own in changes)
    planned = (config.get("meta") or {}).get(PLAN_MARK) if isinstance(config.get("meta"), dict) else None
    return bool(planned) or mixed or not all(stock(own) for own in (config, *changes))


def names_adapter(folder: Path) -> bool:
    """Whether a checkpoint names an adapter of its own.

    Raises:
        AdapterError: when it does so in a wrong form.
    """
    return read_entry(folder) is not None


def read_checkpoint(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Look at a checkpoint's headers and its adapter's; no tensor is read.

    Args:
        folder: of the checkpoint.
        config: its `quantization_config`.

    Raises:
        CheckpointError: for packed modules that do not fit together, or mixtures of experts.
        AdapterError: for an adapter that is named and missing, truncated, of another model, or of a newer version.
    """
    shapes = autoround.tensor_shapes(folder)
    modules = {
        name: _module(folder, name, shapes, config)
        for key in shapes
        if key.endswith(".qweight") and (name := key.removesuffix(".qweight"))
    }
    if not modules:
        raise CheckpointError(f"EoRA: `{folder}` holds no packed layer. Copy the checkpoint again.")
    experts = next((name for name in modules if EXPERT.search(name)), None)
    if experts is not None:
        raise CheckpointError(
            f"EoRA: `{folder}` has quantised experts, {experts} for instance. vLLM joins a layer's experts to one, "
            f"which this plugin cannot multiply yet. Load the checkpoint with GPTQModel."
        )
    entry = read_entry(folder)
    adapter = None if entry is None else named_folder(folder, entry)
    matched = {} if adapter is None else check_adapter(AdapterFolder.open(adapter), modules)
    dense = frozenset(key.removesuffix(".weight") for key, shape in shapes.items()
                      if key.endswith(".weight") and len(shape) == 2)  # fmt: skip
    return Checkpoint(folder, modules, dense, _stores_zero_minus_one(folder, config), adapter, matched)


def _stores_zero_minus_one(folder: Path, config: Mapping[str, Any]) -> bool:
    if autoround.is_autoround(config):
        return autoround.packing(config, str(folder)).format != VERSION_2
    return str(config.get("checkpoint_format", config.get("format"))).lower() != VERSION_2


def _module(
    folder: Path, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> ModuleHeader:
    """Bits and features of a packed module, from the shapes of its tensors alone."""
    found = {part: shapes[f"{name}.{part}"] for part in PACKED if f"{name}.{part}" in shapes}
    missing = [part for part in PACKED[:3] if len(found.get(part, ())) != 2]
    if missing:
        raise CheckpointError(
            f"EoRA: {name} in `{folder}` has no matrix {', '.join(missing)}. Copy the checkpoint again."
        )
    rows, out_features = found["qweight"]
    groups, columns = found["qzeros"]
    asked = {**config, **_dynamic(config, name)}
    # The width of the zeros tells the bits; where outputs do not fill a word, two widths may do.
    widths = [bits for bits in WEIGHT_BITS if words(out_features, bits) == columns]
    if asked.get("bits") in widths:
        widths = [asked["bits"]]
    if len(widths) != 1 or found["scales"] != (groups, out_features):
        raise CheckpointError(
            f"EoRA: {name} in `{folder}` has qweight {rows} × {out_features}, qzeros {groups} × {columns} and scales "
            f"{' × '.join(map(str, found['scales']))}, which fit none of {', '.join(map(str, WEIGHT_BITS))} bits. "
            f"Copy the checkpoint again."
        )
    bits = widths[0]
    in_features = found["g_idx"][0] if "g_idx" in found else rows * 32 // bits
    if words(in_features, bits) != rows:
        raise CheckpointError(
            f"EoRA: {name} in `{folder}` has a qweight of {rows} rows; {in_features} inputs in {bits} bits take "
            f"{words(in_features, bits)}. Copy the checkpoint again."
        )
    group_size = _group_size(in_features, groups, asked.get("group_size"))
    return ModuleHeader(bits, in_features, out_features, group_size, frozenset(found))


def _group_size(in_features: int, groups: int, asked: Any) -> int:
    """Inputs per scale: what the config says, where it gives so many groups; else what the number of groups tells."""
    if isinstance(asked, int) and asked > 0 and -(-in_features // min(asked, in_features)) == groups:
        return asked
    return autoround.group_size_of(in_features, groups)


def _dynamic(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What `dynamic` says of a module: the first of its expressions that fits counts, as in GPTQModel."""
    for pattern, own in (config.get("dynamic") or {}).items():
        if isinstance(own, dict) and not pattern.startswith("-:"):
            try:
                fits = re.match(pattern.removeprefix("+:"), name)
            except re.error as error:
                raise CheckpointError(
                    f"EoRA: the checkpoint's {QUANTIZE_CONFIG} has `{pattern}` under dynamic, which is no regular "
                    f"expression ({error})."
                ) from error
            if fits:
                return own
    return {}


def check_adapter(folder: AdapterFolder, modules: Mapping[str, ModuleHeader]) -> dict[str, str]:
    """Compare an adapter's header with the checkpoint's: names, shapes, and so the length of the file.

    Returns:
        module → what the adapter's file calls it.

    Raises:
        AdapterError: naming the module, what was found and what was expected.
    """
    matched = folder.match(modules)
    with safe_open(folder.weights, framework="pt") as handle:
        for name, stored in matched.items():
            module = modules[name]
            if folder.is_packed:
                found = folder.features.get(stored, (0, 0))[::-1]
            else:
                keys = folder.keys[stored]
                lora_A, lora_B = (handle.get_slice(keys[half]).get_shape() for half in ("lora_A", "lora_B"))
                if len(lora_A) != 2 or len(lora_B) != 2 or lora_A[0] != lora_B[1]:
                    raise AdapterError(
                        f"Adapter: {stored} in `{folder.path}` has A {lora_A} and B {lora_B}, whose ranks are not the "
                        f"same. Copy it again, or make the adapter again with `eora generate`."
                    )
                found = (lora_B[0], lora_A[1])
            if found != (module.out_features, module.in_features):
                raise AdapterError(
                    f"Adapter: {stored} in `{folder.path}` is for a weight of out × in = {found[0]} × {found[1]}, but "
                    f"the checkpoint's is {module.out_features} × {module.in_features}. The adapter was made for "
                    f"{folder.settings.base_model or 'another model'}; use it with that checkpoint."
                )
    return matched
