"""Sensitivities: what an error at a module's output costs in loss, by the second moment of the loss's gradient there.

With g = ∂(loss summed over the tokens of a window)/∂y at a token, and e the error of the output y at it, the loss rises
by about ½ E[(gᵀ e)²] ≈ ½ tr(G S) nats a token, with G = E[g gᵀ] and S = E[e eᵀ]. G is the Fisher information. Errors
are taken to be independent of gradients and of one another, as in K-FAC (arXiv 1503.05671) and HAWQ (arXiv 1911.03852).
With labels drawn from the model itself G is the true Fisher information, which is the curvature of the divergence from
the full-precision model; with the text's own labels it is the empirical one.

Errors are not quite independent of gradients: a token that all others attend to has large gradients and an unusual
input. So the squared norm of each token's gradient is kept as well, by which inputs are weighed
(`ranks.TokenCorrection`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..solve import Moment, RowMoment
from ..system.distributed import current, deal
from ..system.files import replaced_file, write_json
from ..system.tensor_file import write_tensors
from .layered import LayeredModel
from .rows import moment_of

# Parts of a tensor that its fingerprint reads: rows at its beginning, in its middle and at its end.
FINGERPRINT_ROWS = 3
FORMAT = "eora-sensitivity-3"
CONTENTS = "sensitivity.json"


@dataclass(frozen=True)
class Sensitivity(Mapping[str, Moment]):
    """G = E[g gᵀ] of each module, read from its file when it is asked for, so that one is in memory at a time.

    A value is a matrix, out × out float32, or a `RowMoment` of the gradients, tokens × out float32. The file holds the
    gradients, in the dtype that they were computed in, where they take fewer bytes than the matrix.

    Attributes:
        folder: where `SensitivityWriter` put the files.
        files: full module name → file. Modules that no token reached are not in it.
        tokens: number of tokens that gradients were taken of.
        kind: "fisher" or "empirical".
        fingerprint: of model, data, kind and seed.
    """

    folder: Path
    files: Mapping[str, str]
    tokens: int
    kind: str
    fingerprint: str

    def __getitem__(self, name: str) -> Moment:
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            if f"G.{name}" in file.keys():  # noqa: SIM118
                dense: torch.Tensor = file.get_tensor(f"G.{name}").clone()
                return dense
            rows = file.get_tensor(f"g.{name}").to(torch.float32, copy=True)
        return RowMoment(rows, self.tokens)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def squares(self, name: str) -> torch.Tensor:
        """‖g‖² of each token, in the order of the calibration data, float32."""
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(f"s.{name}").clone()
            return found

    @classmethod
    def load(cls, folder: Path) -> Sensitivity:
        """Open what `SensitivityWriter` has finished in a folder.

        Raises:
            ValueError: for a folder of another format.
        """
        header = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        if header.get("format") != FORMAT:
            raise ValueError(f"`{folder}` holds no sensitivities of the format {FORMAT}: {header.get('format')!r}.")
        return cls(folder, header["files"], header["tokens"], header["kind"], header["fingerprint"])


@dataclass
class SensitivityWriter:
    """Writes a `Sensitivity` layer by layer.

    Attributes:
        folder: an empty folder.
        tokens: number of tokens that gradients are taken of.
        files: full module name → file, as far as they are written.
    """

    folder: Path
    tokens: int
    files: dict[str, str] = field(default_factory=dict)

    def add(self, index: int, gradients: Mapping[str, torch.Tensor]) -> None:
        """Keep the gradients of a layer's modules, tokens × out each.

        G is the mean over all tokens, those included that were routed past the module (an expert). So an error counts
        as often as tokens reach the module.

        Raises:
            ValueError: when a gradient holds NaN or infinity.
        """
        tensors: dict[str, torch.Tensor] = {}
        file = f"layer-{index}.safetensors"
        for name, found in self._found(gradients):
            tensors |= found
            self.files[name] = file
        if tensors:
            with replaced_file(self.folder / file) as unfinished:
                write_tensors(unfinished, tensors, {})

    def _found(self, gradients: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """What is kept of each module; several processes, which all have the gradients, share the work."""
        group = current()
        if group is None:
            yield from ((name, self._kept(name, rows)) for name, rows in gradients.items())
            return
        costs = [float(len(rows) * rows.shape[1] ** 2) for rows in gradients.values()]
        owners = dict(zip(gradients, deal(costs, [0.0] * group.size), strict=True))
        made: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {}
        for name, owner in owners.items():
            if owner == group.rank:
                kept = self._kept(name, gradients[name])
                # Rows are in every process already.
                made[name] = (None, {key: one for key, one in kept.items() if not key.startswith("g.")})
        for name, _, tensors in group.spread(owners, made):
            rows = {} if f"G.{name}" in tensors else {f"g.{name}": gradients[name].contiguous().cpu()}
            yield name, rows | tensors

    def _kept(self, name: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is kept of one module: the gradients or their second moment, whichever is smaller, and their squares."""
        moment = moment_of(rows, name, self.tokens)
        kept = {f"s.{name}": rows.to(torch.float32).square().sum(1).cpu()}
        if isinstance(moment, RowMoment) or rows.nbytes < moment.nbytes:
            return kept | {f"g.{name}": rows.contiguous().cpu()}
        return kept | {f"G.{name}": moment.cpu()}

    def finish(self, kind: str, fingerprint: str) -> None:
        """Write which file holds what. Without that a folder is not taken for finished."""
        header = {
            "format": FORMAT,
            "tokens": self.tokens,
            "kind": kind,
            "fingerprint": fingerprint,
            "files": self.files,
        }
        write_json(self.folder / CONTENTS, header)


def fingerprint(
    model: LayeredModel, modules: Sequence[str], batches: Sequence[Mapping[str, Any]], kind: str, seed: int = 0
) -> str:
    """A digest of what a sensitivity depends on: some rows of each weight, the data, the kind, the seed."""
    digest = hashlib.sha256(json.dumps([FORMAT, sorted(modules), kind, seed]).encode())
    for name, shape, some in model.samples(FINGERPRINT_ROWS):
        digest.update(f"{name} {tuple(shape)}".encode() + some.to(torch.float32).contiguous().numpy().tobytes())
    for batch in batches:
        for key in ("input_ids", "attention_mask"):
            if batch.get(key) is not None:
                digest.update(torch.as_tensor(batch[key]).to(torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()
