"""The zeros of a pruned model, counted in its files without loading it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..formats.gptq_checkpoint import FORMATS, checkpoint_format, packed_weights
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
    """Count the zeros of a model's linear modules; None for a model that is not pruned.

    Every weight is read once; one is in memory at a time. A quantised model is examined where `pruning.json` says that
    it was pruned, by the codes that stand for zero: others have many of these, too, at few bits.

    Args:
        folder: a model's, or a checkpoint's in GPTQ's layout.

    Raises:
        LayoutError: for packed tensors that do not fit each other.
    """
    said = _said(folder)
    read = _read_packed(folder) if said and (folder / QUANTIZE_CONFIG).is_file() else _read_plain(folder)
    modules: dict[str, Sparsity] = {}
    whole, dense, sparse = [], 0, 0
    for name, bits, weight in read:
        found = examine(weight)
        if found.is_pruned and found.pattern is None:
            # GPT-2's `Conv1D` is stored in × out.
            turned = examine(weight.T.contiguous())
            found = turned if turned.pattern is not None else found
        if found.is_pruned:
            modules[name] = found
            dense, sparse = dense + found.weights * bits // 8, sparse + found.nbytes(bits)
        else:
            whole.append(name)
    if not modules:
        return None
    expected = str(said["pattern"]) if ":" in str(said.get("pattern", "")) else None
    if not said:
        kept = Counter(one.pattern for one in modules.values())
        expected = kept.most_common(1)[0][0]
    return PrunedModel(expected, modules, whole, dense, sparse, said)


def _read_plain(folder: Path) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Name, bits of a value and weight of each linear module in a layer; none of a quantised model."""
    path = folder / MODEL_CONFIG
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")).get("quantization_config"):
        return
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                bits = FLOATING_BITS.get(part.get_dtype())
                if bits is not None and len(part.get_shape()) == 2 and LAYER_WEIGHT.fullmatch(key):
                    yield key.removesuffix(".weight"), bits, file.get_tensor(key)


def _read_packed(folder: Path) -> Iterator[tuple[str, int, torch.Tensor]]:
    """As `_read_plain`, of a checkpoint in GPTQ's layout: the weight is the codes less the code that means zero."""
    zero_minus_one = FORMATS.get(checkpoint_format(folder))
    if zero_minus_one is None:
        return
    with ExitStack() as stack:
        for name, read in sorted(packed_weights(folder, stack, zero_minus_one).items()):
            packed = read()
            yield name, packed.bits, (packed.codes() - packed.zeros()[packed.group_of_input()]).T.contiguous()


def _said(folder: Path) -> dict[str, Any]:
    path = folder / PRUNING_DETAILS
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
