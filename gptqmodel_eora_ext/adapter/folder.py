"""Adapters on disk: plain PEFT LoRA folders, with what EoRA adds in a file of its own.

adapter_config.json         PEFT's LoraConfig; every module's alpha equals its rank, so the scale is 1
adapter_model.safetensors   base_model.model.<module>.lora_A.weight (rank × in), …lora_B.weight (out × rank)
eora.json                   objective, calibration, versions and per-module errors; optional
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..formats.factors import QuantizedFactor
from ..formats.names import ADAPTER_CONFIG, ADAPTER_DETAILS, ADAPTER_WEIGHTS
from ..formats.numbers import is_whole
from ..formats.packed_factors import FEATURES, read_packed
from ..formats.packed_weights import LayoutError
from .errors import AdapterError
from .settings import AdapterSettings, read_details

log = logging.getLogger(__name__)

KEY_PREFIX = "base_model.model."
# PEFT saves without the adapter's name in the key; older files carry it as `lora_A.default.weight`.
KEY_PATTERN = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.(?P<half>lora_[AB])(?:\.[^.]+)?\.weight$")
# PEFT copies stored factors into float32 parameters; 16-bit ones are kept as they are, which loses nothing.
READ_AS = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.bfloat16,
    torch.float32: torch.float32,
    torch.float64: torch.float32,
}
PACKED_PATTERN = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.(?P<half>lora_[AB]\.(?:qweight|scales))$")


@dataclass(frozen=True)
class ReadFactors:
    """Factors of one module as read, finite.

    Attributes:
        lora_A: rank × in_features; float16, bfloat16 or float32, as PEFT would read it (float64 becomes float32).
        lora_B: out_features × rank, likewise, PEFT's scale folded in.
        packed: A and Bᵀ in integers, where they are stored so; ``lora_A`` and ``lora_B`` are their values, float32.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    packed: tuple[QuantizedFactor, QuantizedFactor] | None = None


@dataclass(frozen=True)
class AdapterFolder:
    """A PEFT LoRA folder, or one of packed factors, opened for reading. Tensors are read one module at a time.

    Attributes:
        path: the folder.
        settings: its `adapter_config.json`.

    Example:
        >>> folder = AdapterFolder.open("out/eora")
        >>> for module, factors in folder.factors(folder.keys):
        ...     update = factors.lora_B.float() @ factors.lora_A.float()  # out_features × in_features
    """

    path: Path
    settings: AdapterSettings

    @classmethod
    def open(cls, path: str | Path) -> AdapterFolder:
        """Open and check a folder. Reads the config and the header of the weights, no tensor.

        Args:
            path: a folder with `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            AdapterError: when a file is missing or broken, a setting has a wrong value, or the adapter is of a kind
                that is not plain LoRA; the message names file and field, what was found, and what would do.

        Example:
            >>> AdapterFolder.open("out/eora").settings.rank
            32
        """
        path = Path(path)
        if not path.is_dir():
            raise AdapterError(f"Adapter: `{path}` is not a folder. An adapter is a folder with {ADAPTER_CONFIG} "
                               f"and {ADAPTER_WEIGHTS}.")  # fmt: skip
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (path / name).is_file():
                found = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
                raise AdapterError(f"Adapter: `{path}` has no {name}; found {found}. Save the adapter again.")
        folder = cls(path, AdapterSettings.read(path / ADAPTER_CONFIG))
        folder.keys  # noqa: B018  reads the safetensors header, so that a broken file fails here
        return folder

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.path / ADAPTER_WEIGHTS

    @property
    def factor_bits(self) -> int:
        """Bits of a stored value: 16 (or 32) in a PEFT folder, 8 or 4 where packed."""
        return self.settings.factor_bits

    @property
    def is_packed(self) -> bool:
        """Whether factors are stored as integers."""
        return self.settings.is_packed

    @cached_property
    def features(self) -> dict[str, tuple[int, int]]:
        """Module → (in_features, out_features) of a packed folder.

        Raises:
            AdapterError: when the file does not tell.
        """
        with safe_open(self.weights, framework="pt") as handle:
            metadata = handle.metadata() or {}
        try:
            found = json.loads(metadata[FEATURES])
            for wide, tall in found.values():
                if not (is_whole(wide, 1) and is_whole(tall, 1)):
                    raise ValueError(f"{wide!r} and {tall!r} are no widths")
            return {name: (wide, tall) for name, (wide, tall) in found.items()}
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise AdapterError(
                f"Adapter: `{self.weights}` does not tell the widths of its packed factors (metadata `{FEATURES}`: "
                f"{error}). Copy it again, or make the adapter again with `eora generate`."
            ) from error

    @cached_property
    def keys(self) -> dict[str, dict[str, str]]:
        """Module → {"lora_A": key, "lora_B": key}, modules named as in the file; four keys where factors are packed.

        Modules that the config leaves out (`target_modules` and the like) are left out, as by PEFT.
        """
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
            halves = found.setdefault(match["module"], {})
            if match["half"] in halves:
                raise AdapterError(f"Adapter: `{self.weights}` holds {match['half']} of {match['module']} twice, as "
                                   f"`{halves[match['half']]}` and `{key}`. Save the adapter again.")  # fmt: skip
            halves[match["half"]] = key
        for module, halves in found.items():
            if len(halves) != parts:
                raise AdapterError(f"Adapter: `{self.weights}` has only {', '.join(sorted(halves))} of {module}.")
        if not found:
            raise AdapterError(f"Adapter: `{self.weights}` holds no factors.")
        applied = {module: halves for module, halves in found.items() if self.settings.applies_to(module)}
        if not applied:
            raise AdapterError(
                f"Adapter: {self.settings.where} adapts none of the {len(found)} modules that {ADAPTER_WEIGHTS} has "
                f"factors for, such as {next(iter(found))}. Correct target_modules, exclude_modules or "
                f"layers_to_transform there."
            )
        if len(applied) < len(found):
            log.warning("Adapter: %s adapts %d of the %d modules that %s has factors for; the others are left out, as "
                        "by PEFT.", self.settings.where, len(applied), len(found), ADAPTER_WEIGHTS)  # fmt: skip
        return applied

    @cached_property
    def details(self) -> Mapping[str, Any] | None:
        """What `eora.json` says, checked; None for an adapter that another tool made.

        Raises:
            AdapterError: when a part of it has a wrong form.
        """
        path = self.path / ADAPTER_DETAILS
        return read_details(path) if path.is_file() else None

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
                f"{self.settings.base_model or 'another model'}; use it with that checkpoint."
            )
        return matched

    def factors(self, modules: Collection[str]) -> Iterator[tuple[str, ReadFactors]]:
        """Yield (module, factors), one module in memory at a time.

        Args:
            modules: names out of `keys`.

        Raises:
            AdapterError: when factors are no finite floating matrices, packed ones do not fit their widths, or ranks
                inside the file disagree with each other or with the config.
        """
        with safe_open(self.weights, framework="pt") as handle:
            for module in modules:
                yield module, self._read(handle, module)

    def _read(self, handle: safe_open, module: str) -> ReadFactors:
        keys, rank = self.keys[module], self.rank(module)
        if self.is_packed:
            return self._read_packed(handle, module)
        lora_A, lora_B = (self._matrix(handle, keys[half]) for half in ("lora_A", "lora_B"))
        if lora_A.shape[0] != rank or lora_B.shape[1] != rank:
            raise self._wrong_rank(module, tuple(lora_A.shape), tuple(lora_B.shape))
        scale = self.settings.scale_of(module)
        if scale != 1:
            lora_B = self._finite(lora_B * scale, f"{keys['lora_B']}, scaled by {scale:g},")
        return ReadFactors(lora_A, lora_B)

    def _read_packed(self, handle: safe_open, module: str) -> ReadFactors:
        if module not in self.features:
            raise AdapterError(f"Adapter: `{self.weights}` does not tell the widths of {module}.")
        keys, where = self.keys[module], f"{module} in `{self.weights}`"
        try:
            packed = read_packed(handle, keys, self.features[module], self.factor_bits, where)
        except LayoutError as error:
            raise AdapterError(f"Adapter: {error}") from error
        lora_A, lora_B = packed[0].dequantize(), packed[1].dequantize().T.contiguous()
        if lora_A.shape[0] != self.rank(module):
            raise self._wrong_rank(module, tuple(lora_A.shape), tuple(lora_B.shape))
        for half, factor in zip(("lora_A", "lora_B"), packed, strict=True):
            self._finite(factor.scales, keys[f"{half}.scales"])
        return ReadFactors(lora_A, lora_B, packed)

    def _matrix(self, handle: safe_open, key: str) -> torch.Tensor:
        tensor = handle.get_tensor(key)
        if tensor.ndim != 2 or tensor.dtype not in READ_AS:
            raise AdapterError(
                f"Adapter: `{self.weights}` holds `{key}` as {tensor.dtype} {tuple(tensor.shape)}; expected a matrix "
                f"in float16, bfloat16, float32 or float64. Save the adapter again."
            )
        # A copy: what the file gives is a part of its mapping, whose pages stay in memory beside the kernels' own form
        # of the factor, and change when somebody writes the file anew.
        return self._finite(tensor.to(READ_AS[tensor.dtype], copy=True), key)

    def _finite(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                f"Adapter: `{self.weights}` holds NaN or infinity in {what}; every output would be NaN. Copy it again, "
                f"or make the adapter again."
            )
        return tensor

    def _wrong_rank(self, module: str, lora_A: tuple[int, ...], lora_B: tuple[int, ...]) -> AdapterError:
        return AdapterError(
            f"Adapter: {module} in `{self.path}` has A {lora_A} and B {lora_B}, but {ADAPTER_CONFIG} gives it rank "
            f"{self.rank(module)}. Correct r or rank_pattern there, or save the adapter again."
        )

    def rank(self, module: str) -> int:
        """Rank of a module by `r` and `rank_pattern`."""
        return self.settings.rank_of(module)
