"""Adapters on disk: plain PEFT LoRA folders, with what EoRA adds in a file of its own.

adapter_config.json         PEFT's LoraConfig; every module's alpha equals its rank, so the scale is 1
adapter_model.safetensors   base_model.model.<module>.lora_A.weight (rank × in), …lora_B.weight (out × rank)
eora.json                   objective, calibration, versions and per-module errors; optional
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..formats.factors import GROUP_SIZE, QuantizedFactor
from ..formats.names import ADAPTER_CONFIG, ADAPTER_DETAILS, ADAPTER_WEIGHTS
from ..formats.packed_factors import FEATURES, PACKED_TYPE, read_packed
from ..formats.packed_weights import LayoutError, is_count
from .vocabulary import FACTOR_BITS

DETAILS_VERSION = 1
KEY_PREFIX = "base_model.model."
# PEFT saves without the adapter's name in the key; older files carry it as `lora_A.default.weight`.
KEY_PATTERN = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.(?P<half>lora_[AB])(?:\.[^.]+)?\.weight$")
PACKED_PATTERN = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.(?P<half>lora_[AB]\.(?:qweight|scales))$")


class AdapterError(ValueError):
    """An adapter folder that cannot be used; the message tells what was found and what would do."""


@dataclass(frozen=True)
class ReadFactors:
    """Factors of one module as read: A rank × in, B out × rank, PEFT's scale folded into B.

    ``packed`` holds A and Bᵀ in integers where they are stored so; A and B are their values then, float32.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    packed: tuple[QuantizedFactor, QuantizedFactor] | None = None


@dataclass(frozen=True)
class AdapterFolder:
    """A PEFT LoRA folder, or one of packed factors, opened for reading. Tensors are read one module at a time."""

    path: Path
    config: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> AdapterFolder:
        """Open and check a folder.

        Raises:
            AdapterError: when a file is missing or broken, or the adapter is of a kind that is not plain LoRA.
        """
        path = Path(path)
        if not path.is_dir():
            raise AdapterError(f"Adapter: `{path}` is not a folder. An adapter is a folder with {ADAPTER_CONFIG} "
                               f"and {ADAPTER_WEIGHTS}.")  # fmt: skip
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (path / name).is_file():
                found = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
                raise AdapterError(f"Adapter: `{path}` has no {name}; found {found}. Save the adapter again.")
        folder = cls(path, read_json(path / ADAPTER_CONFIG))
        folder._check_kind()
        folder.keys  # noqa: B018  reads the safetensors header, so that a broken file fails here
        return folder

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.path / ADAPTER_WEIGHTS

    def _check_kind(self) -> None:
        where = f"Adapter: `{self.path / ADAPTER_CONFIG}`"
        kind = str(self.config.get("peft_type", "LORA")).upper()
        if kind not in ("LORA", PACKED_TYPE):
            raise AdapterError(f"{where} says peft_type {kind}; only LORA and {PACKED_TYPE} adapters can be applied.")
        layout = (self.config.get("factor_bits"), self.config.get("factor_group_size"))
        if kind == PACKED_TYPE and (layout[0] not in FACTOR_BITS[1:] or layout[1] != GROUP_SIZE):
            raise AdapterError(
                f"{where} says factor_bits {layout[0]}, factor_group_size {layout[1]}; this version reads 8 and 4 bits "
                f"in groups of {GROUP_SIZE}. A newer gptqmodel-eora-ext may have written it."
            )
        if self.config.get("use_dora"):
            raise AdapterError(f"{where} says use_dora; only plain LoRA adapters can be applied.")
        if not is_count(self.config.get("r")):
            raise AdapterError(f"{where} says r = {self.config.get('r')!r}; expected a positive integer.")

    @property
    def factor_bits(self) -> int:
        """Bits of a stored value: 16 (or 32) in a PEFT folder, 8 or 4 where packed."""
        return int(self.config.get("factor_bits", FACTOR_BITS[0]))

    @property
    def is_packed(self) -> bool:
        """Whether factors are stored as integers."""
        return str(self.config.get("peft_type")).upper() == PACKED_TYPE

    @cached_property
    def features(self) -> dict[str, tuple[int, int]]:
        """Module → (in, out) of a packed folder.

        Raises:
            AdapterError: when the file does not tell.
        """
        with safe_open(self.weights, framework="pt") as handle:
            metadata = handle.metadata() or {}
        try:
            found = {name: (wide, tall) for name, (wide, tall) in json.loads(metadata[FEATURES]).items()}
            if not all(map(is_count, itertools.chain.from_iterable(found.values()))):
                raise ValueError(FEATURES)
            return found
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise AdapterError(
                f"Adapter: `{self.weights}` does not tell the widths of its packed factors (metadata `{FEATURES}`). "
                f"Copy it again, or make the adapter again with `eora generate`."
            ) from error

    @cached_property
    def keys(self) -> dict[str, dict[str, str]]:
        """Module → {"lora_A": key, "lora_B": key}, modules named as in the file; four keys where factors are packed."""
        try:
            with safe_open(self.weights, framework="pt") as handle:
                names = list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise AdapterError(
                f"Adapter: `{self.weights}` is truncated or corrupted ({error}). "
                f"Copy it again, or make the adapter again with `eora generate`."
            ) from error
        found: dict[str, dict[str, str]] = {}
        pattern, parts = (PACKED_PATTERN, 4) if self.is_packed else (KEY_PATTERN, 2)
        for key in names:
            match = pattern.match(key)
            if match is None:
                raise AdapterError(f"Adapter: `{self.weights}` holds `{key}`, which is no LoRA factor.")
            found.setdefault(match["module"], {})[match["half"]] = key
        for module, halves in found.items():
            if len(halves) != parts:
                raise AdapterError(f"Adapter: `{self.weights}` has only {', '.join(sorted(halves))} of {module}.")
        if not found:
            raise AdapterError(f"Adapter: `{self.weights}` holds no factors.")
        return found

    @cached_property
    def details(self) -> Mapping[str, Any] | None:
        """What `eora.json` says; None for an adapter that another tool made."""
        path = self.path / ADAPTER_DETAILS
        return read_json(path) if path.is_file() else None

    def match(self, names: Collection[str]) -> dict[str, str]:
        """Pair the model's module names with the file's: ``{model name: file name}``.

        GPTQModel's own writer lower-cases names, and a base loaded by another class may carry one more or one fewer
        leading `model.`; both are matched where only one module can be meant.

        Raises:
            AdapterError: when the file holds factors for modules that ``names`` lacks.
        """
        by_lower = {name.lower(): name for name in names}
        matched: dict[str, str] = {}
        unmatched = []
        for module in self.keys:
            candidates = (module, f"model.{module}", module.removeprefix("model."))
            hit = next((by_lower[c.lower()] for c in candidates if c.lower() in by_lower), None)
            if hit is None:
                unmatched.append(module)
            else:
                matched[hit] = module
        if unmatched:
            shown = ", ".join(unmatched[:3]) + (", …" if len(unmatched) > 3 else "")
            example = next(iter(names), "none")
            raise AdapterError(
                f"Adapter: `{self.path}` holds factors for {len(unmatched)} of {len(self.keys)} modules that are no "
                f"quantised module of this model ({shown}; the model has for instance {example}). It was made for "
                f"{self.config.get('base_model_name_or_path') or 'another model'}; use it with that checkpoint."
            )
        return matched

    def factors(self, modules: Collection[str]) -> Iterator[tuple[str, ReadFactors]]:
        """Yield (module, factors).

        Raises:
            AdapterError: when ranks inside the file disagree with each other or with the config.
        """
        with safe_open(self.weights, framework="pt") as handle:
            for module in modules:
                found = self._read(handle, module)
                rank = self.rank(module)
                if found.lora_A.shape[0] != rank or found.lora_B.shape[1] != rank:
                    raise AdapterError(
                        f"Adapter: {module} in `{self.path}` has A {tuple(found.lora_A.shape)} and B "
                        f"{tuple(found.lora_B.shape)}, but {ADAPTER_CONFIG} gives it rank {rank}."
                    )
                yield module, found

    def _read(self, handle: safe_open, module: str) -> ReadFactors:
        keys = self.keys[module]
        if not self.is_packed:
            scale = self._scale(module, self.rank(module))
            lora_A, lora_B = (handle.get_tensor(keys[half]) for half in ("lora_A", "lora_B"))
            for half, found in (("lora_A", lora_A), ("lora_B", lora_B)):
                if found.ndim != 2 or not found.is_floating_point():
                    raise AdapterError(
                        f"Adapter: {half} of {module} in `{self.weights}` should be a matrix of floating numbers, "
                        f"found {found.dtype} of shape {list(found.shape)}. Copy it again, or make the adapter again."
                    )
            return ReadFactors(lora_A, lora_B if scale == 1 else lora_B * scale)
        if module not in self.features:
            raise AdapterError(f"Adapter: `{self.weights}` does not tell the widths of {module}.")
        try:
            packed = read_packed(handle, keys, self.features[module], self.factor_bits, f"{module} in `{self.weights}`")
        except LayoutError as error:
            raise AdapterError(f"Adapter: {error}") from error
        return ReadFactors(packed[0].dequantize(), packed[1].dequantize().T.contiguous(), packed)

    def rank(self, module: str) -> int:
        """Rank of a module by `r` and `rank_pattern`."""
        rank = _from_pattern(self.config.get("rank_pattern"), module, self.config["r"])
        if not is_count(rank):
            raise AdapterError(f"Adapter: {ADAPTER_CONFIG} of `{self.path}` gives {module} rank {rank!r}; expected a "
                               f"positive integer.")  # fmt: skip
        return int(rank)

    def _scale(self, module: str, rank: int) -> float:
        alpha = _from_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", rank))
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank


def _from_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: a key matches as a regular expression against the end of the module's name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"Adapter: `{path}` cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise AdapterError(f"Adapter: `{path}` holds a {type(content).__name__}, expected an object.")
    return content
