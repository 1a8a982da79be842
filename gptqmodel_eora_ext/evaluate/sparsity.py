"""The zeros of a pruned model, counted in its files without loading it."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..formats.names import MODEL_CONFIG, PRUNING_DETAILS, QUANTIZE_CONFIG
from ..formats.sparsity import Sparsity, examine

# Weights of linear modules inside a layer, which has a number in its name.
LAYER_WEIGHT = re.compile(r".*\.\d+\..*\.weight")
# safetensors' names of what a pruned weight is stored in → bits.
FLOATING_BITS = {"BF16": 16, "F16": 16, "F32": 32}


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model's zeros.

    Attributes:
        expected: pattern that the model is said to have, or that most of its modules keep; None where there is none.
        modules: module → its zeros, of those that are pruned.
        whole: linear modules that are not.
        dense_bytes: of the pruned modules' weights as they are stored.
        sparse_bytes: of the same in a layout that leaves the zeros out.
        said: what `pruning.json` says; empty where another tool pruned.
    """

    expected: str | None
    modules: dict[str, Sparsity]
    whole: list[str]
    dense_bytes: int
    sparse_bytes: int
    said: dict[str, Any]

    @property
    def broken(self) -> list[str]:
        """Pruned modules that do not keep the expected pattern."""
        if self.expected is None:
            return []
        return [name for name, one in self.modules.items() if one.pattern != self.expected]

    @property
    def share(self) -> float:
        """Of zeros in the pruned modules."""
        return sum(one.zeros for one in self.modules.values()) / sum(one.weights for one in self.modules.values())

    def as_json(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "pattern": self.expected,
            "broken": self.broken,
            "share": self.share,
            "not pruned": self.whole,
            "dense_bytes": self.dense_bytes,
            "sparse_bytes": self.sparse_bytes,
            "modules": {name: {"pattern": one.pattern, "share": one.share} for name, one in self.modules.items()},
        }


def examine_model(folder: Path) -> PrunedModel | None:
    """Count the zeros of a model's linear modules; None for a model that is quantised, or not pruned.

    Every weight is read once; one is in memory at a time.

    Args:
        folder: a model's.
    """
    if not _is_plain(folder):
        return None
    modules: dict[str, Sparsity] = {}
    whole, dense, sparse = [], 0, 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                bits = FLOATING_BITS.get(part.get_dtype())
                if bits is None or len(part.get_shape()) != 2 or not LAYER_WEIGHT.fullmatch(key):
                    continue
                name, found = key.removesuffix(".weight"), examine(file.get_tensor(key))
                if found.is_pruned:
                    modules[name] = found
                    dense, sparse = dense + found.weights * bits // 8, sparse + found.nbytes(bits)
                else:
                    whole.append(name)
    if not modules:
        return None
    said = _said(folder)
    expected = str(said["pattern"]) if ":" in str(said.get("pattern", "")) else None
    if not said:
        kept = Counter(one.pattern for one in modules.values())
        expected = kept.most_common(1)[0][0]
    return PrunedModel(expected, modules, whole, dense, sparse, said)


def _is_plain(folder: Path) -> bool:
    path = folder / MODEL_CONFIG
    if not path.is_file() or (folder / QUANTIZE_CONFIG).is_file():
        return False
    return not json.loads(path.read_text(encoding="utf-8")).get("quantization_config")


def _said(folder: Path) -> dict[str, Any]:
    path = folder / PRUNING_DETAILS
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
