"""What the models of an evaluation are, read from their folders: sizes, ranks, errors, spectra; and on what machine."""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..adapter.folder import AdapterFolder
from ..adapter.settings import MODULES_BEFORE
from ..adapter.summary import AdapterSummary, summarize
from ..formats.sizes import factor_bytes
from ..formats.sizes import weight_bytes as stored_bytes
from .size import StoredModule, stored_modules, weight_bytes
from .subjects import FULL_PRECISION, Subject

PACKAGES = ("gptqmodel-eora-ext", "gptqmodel", "torch", "transformers", "peft", "lm-eval")
# Rows of the table of sizes: ranks and widths of factors that people choose among, and plain models beside them.
TABLE_RANKS, TABLE_FACTOR_BITS, TABLE_BITS = (16, 32, 64, 128, 256), (16, 4), (2, 3, 4)
# Digits of a singular value: a spectrum is looked at, and the record stays small.
SPECTRUM_DIGITS = 4


def describe(subject: Subject) -> dict[str, Any]:
    """A model's entry in the record."""
    place = Path(subject.model)
    found: dict[str, Any] = {
        "name": subject.name,
        "kind": subject.kind,
        "path": subject.model,
        "adapter_path": None if subject.adapter is None else str(subject.adapter),
        "bytes": weight_bytes(place) or None,
        "adapter_bytes": 0,
    }
    if subject.adapter is not None:
        summary = summarize(subject.adapter)
        found["adapter_bytes"] = summary.bytes
        found["adapter"] = _adapter(summary)
    if subject.kind != FULL_PRECISION and (modules := stored_modules(place)):
        found["quantised"] = _quantised(modules, weight_bytes(place), found["adapter_bytes"])
    return found


def _quantised(modules: Sequence[StoredModule], total: int, adapter: int) -> dict[str, Any]:
    weights = sum(one.shape.weights for one in modules)
    packed = sum(one.nbytes for one in modules)
    group_size = Counter(one.group_size for one in modules).most_common(1)[0][0]
    shapes = [one.shape for one in modules]
    rest = total - packed
    adapters = [
        {
            "rank": rank,
            "factor_bits": bits,
            "bytes": (nbytes := sum(factor_bytes(min(rank, *_sides(one)), one.shape, bits) for one in modules)),
            "total": total + nbytes,
        }
        for bits in TABLE_FACTOR_BITS
        for rank in TABLE_RANKS
    ]
    return {
        "modules": len(modules),
        "weights": weights,
        "group_size": group_size,
        "widths": {str(bits): count for bits, count in sorted(Counter(one.bits for one in modules).items())},
        "bits_per_weight": 8 * (packed + adapter) / weights,
        "table": {
            "rest": rest,
            "plain": {
                str(bits): rest + sum(stored_bytes(shape, bits, group_size) for shape in shapes) for bits in TABLE_BITS
            },
            "adapters": adapters,
        },
    }


def _sides(module: StoredModule) -> tuple[int, int]:
    return module.shape.out_features, module.shape.in_features


def _adapter(summary: AdapterSummary) -> dict[str, Any]:
    details = summary.details
    # Refinement leaves no errors of single modules, so those of the factors that it began with are told.
    modules = summary.modules or details.get(MODULES_BEFORE, {})
    return {
        "factor_bits": summary.factor_bits,
        "ranks": dict(summary.ranks),
        "error_left": None if math.isnan(left := summary.error_left()) else left,
        "errors": {
            name: [one["error_before"] / one["signal"], one["error_after"] / one["signal"]]
            for name, one in modules.items()
            if one["signal"]
        },
        "refined": details.get("refinement"),
        "spectra": spectra(summary.folder),
        **{
            key: details.get(key)
            for key in ("objective", "method", "rank", "calibration", "versions", "seconds", "allocation")
        },
    }


def spectra(folder: Path) -> dict[str, list[float]]:
    """Singular values of B A for every module of an adapter, descending.

    With B = Q₁R₁ and Aᵀ = Q₂R₂ they are those of R₁R₂ᵀ, rank × rank, whatever the size of the layer.
    """
    found = {}
    opened = AdapterFolder.open(folder)
    for module, factors in opened.factors(list(opened.keys)):
        first, second = (
            torch.linalg.qr(one.to(torch.float32), mode="r").R for one in (factors.lora_B, factors.lora_A.T)
        )
        values = torch.linalg.svdvals(first @ second.T)
        found[module] = [float(f"{value:.{SPECTRUM_DIGITS}g}") for value in values.tolist()]
    return found


def surroundings(device: str) -> dict[str, Any]:
    """When, with which versions and on which machine something is measured."""
    return {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {
            "system": platform.platform(terse=True),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else device,
        },
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
