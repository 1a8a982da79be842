"""Ŵ of a full-precision model's modules, from a checkpoint that transformers loads.

Whether the checkpoint was made from that model is found out before the first layer is run: by names and shapes, by the
embeddings and the norms, which no compression touches, and by how well Ŵ agrees with W.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...formats.sizes import ModuleShape
from ...plan.checkpoint import sampled_rows
from ..base_check import LEAST_AGREEMENT, agreement, check_embeddings, scales_were_moved
from ..jobs import KnownWeights, ReadWeight
from .dense import dense_weight
from .reader import LayerReader, part_of

log = logging.getLogger(__name__)

# Rows that are compared before the run. They are taken evenly from all of the matrix.
SAMPLED_ROWS = 64
# So many names are told in a message.
NAMES_TOLD = 6


class ForeignWeights:
    """Finds a model's modules in a checkpoint.

    Args:
        reader: of the checkpoint.
        base: what the full-precision model is called, for messages.
    """

    def __init__(self, reader: LayerReader, base: str) -> None:
        self._reader = reader
        self._base = base
        dtype = getattr(reader.model.config, "dtype", None)
        self._dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16

    def known(self, shapes: Sequence[ModuleShape], read: ReadWeight, base: Path | None) -> KnownWeights:
        """What gives Ŵ of each module whose weight the checkpoint has changed.

        Args:
            shapes: the modules of the loop.
            read: gives W.
            base: the full-precision model's folder; None where there is none to look into.

        Raises:
            ValueError: where the checkpoint is not of this model, or holds its own weights.
            NotImplementedError: where modules are not where the model has them, or norms were changed as well.
        """
        self._check_names(shapes)
        self._check_shapes(shapes)
        if base is not None:
            check_embeddings(self._reader.folder, base, self._base)
            self._check_norms(base)
        changed = [shape for shape in shapes if not self._is_unchanged(shape, read)]
        if not changed:
            raise ValueError(
                f"EoRA: `{self._reader.folder}` holds the very weights of `{self._base}` in all {len(shapes)} linear "
                f"modules, so there is nothing to compensate. Name the compressed checkpoint."
            )
        if len(changed) < len(shapes):
            log.info("EoRA: %d of %d modules are as in the base and get no adapter.", len(shapes) - len(changed),
                     len(shapes))  # fmt: skip
        for shape in self._some(changed):
            self._check(shape, self._dense(shape), read(shape.name))
        return {shape.name: self._giver(shape) for shape in changed}

    def check_format(self, shapes: Sequence[str]) -> None:
        """Read one module, so that a format which cannot be read here is refused before the base is loaded.

        Args:
            shapes: full names of linear modules.
        """
        first = next((name for name in shapes if self._reader.place(name) and not self._reader.is_dense(name)), None)
        if first is not None:
            self._read(first)

    def _check_names(self, shapes: Sequence[ModuleShape]) -> None:
        missing = [shape for shape in shapes if self._reader.place(shape.name) is None]
        if not missing:
            return
        name = missing[0].name
        part, known = part_of(name), {path for path, _ in self._reader.model.named_modules()}
        # What the architecture does not know comes first: it is what modules were joined into, or renamed to.
        held = sorted(self._reader.inside(name), key=lambda inside: f"{part}.{inside}" in known)
        more = f" and {len(held) - NAMES_TOLD} more" if len(held) > NAMES_TOLD else ""
        raise NotImplementedError(
            f"EoRA: `{self._reader.folder}` has no module {name}, which `{self._base}` has. In its place, "
            f"{part}, it holds {', '.join(held[:NAMES_TOLD]) or 'nothing'}{more}. "
            f"{len(shapes) - len(missing)} of {len(shapes)} modules were matched by name. Where a tool has "
            f"renamed or joined modules, an adapter for the model's own names would not load; export the checkpoint "
            f"with the model's own modules."
        )

    def _check_shapes(self, shapes: Sequence[ModuleShape]) -> None:
        for shape in shapes:
            expected = (shape.out_features, shape.in_features)
            found = self._reader.shape(shape.name)
            if found is None:
                raise NotImplementedError(
                    f"EoRA: {shape.name} is a linear layer in `{self._base}` and none in the architecture of "
                    f"`{self._reader.folder}` ({type(self._reader.model).__name__}); its weight may be a part of a "
                    f"tensor of several experts, over which PEFT puts no adapter."
                )
            if found not in (expected, expected[::-1]):
                raise ValueError(self._other(shape.name, f"{' × '.join(map(str, found))} in the checkpoint, "
                                                         f"{expected[0]} × {expected[1]} in the base"))  # fmt: skip

    def _check_norms(self, base: Path) -> None:
        if scales_were_moved(self._reader.folder, base):
            raise NotImplementedError(
                f"EoRA: norms of `{self._reader.folder}` differ from those of `{self._base}`. A tool has moved scales "
                f"between layers (SmoothQuant, AWQ) or trained them, so W and Ŵ cannot be subtracted. Compress the "
                f"model without that, or in AWQ's or GPTQ's own format, where scales are moved back."
            )

    def _is_unchanged(self, shape: ModuleShape, read: ReadWeight) -> bool:
        if not self._reader.is_dense(shape.name):
            return False
        stored = self._dense(shape)
        weight = read(shape.name)
        if weight.shape != stored.shape:
            weight = weight.T
        # A copy of the base in another dtype differs by its rounding alone.
        narrow = self._reader.module(shape.name).weight.dtype
        return torch.equal(weight.to(narrow), stored.to(narrow))  # type: ignore[arg-type]

    def _some(self, shapes: Sequence[ModuleShape]) -> list[ModuleShape]:
        """Modules of the first layer and of the last."""
        ends = {part_of(shapes[0].name), part_of(shapes[-1].name)}
        return [shape for shape in shapes if part_of(shape.name) in ends]

    def _read(self, name: str) -> torch.Tensor:
        module = self._reader.module(name)
        lacking = next((key for key, tensor in module.named_parameters() if tensor.is_meta), None)
        if lacking is not None:
            from importlib.metadata import version

            raise ValueError(
                f"EoRA: transformers {version('transformers')} reads no {lacking} of {name} from "
                f"`{self._reader.folder}` ({self._reader.method}), whose files hold "
                f"{', '.join(self._reader.tensors_of(name)[:NAMES_TOLD])} there. Use a release that opens it."
            )
        return dense_weight(module, name, self._dtype)

    def _dense(self, shape: ModuleShape) -> torch.Tensor:
        found = self._read(shape.name)
        if tuple(found.shape) != (shape.out_features, shape.in_features):
            raise ValueError(self._other(shape.name, f"{' × '.join(map(str, found.shape))} in the checkpoint, "
                                         f"{shape.out_features} × {shape.in_features} in the base"))  # fmt: skip
        return found

    def _giver(self, shape: ModuleShape) -> Callable[[torch.Tensor], torch.Tensor]:
        def give(weight: torch.Tensor) -> torch.Tensor:
            found = self._dense(shape)
            self._check(shape, found, weight)
            return found

        return give

    def _check(self, shape: ModuleShape, found: torch.Tensor, weight: torch.Tensor) -> None:
        """Compare some rows of Ŵ and W."""
        if weight.shape != found.shape:
            weight = weight.T
        rows = sampled_rows(found.shape, SAMPLED_ROWS)
        agreed = agreement(found[rows], weight[rows].to(found.device, torch.float32))
        if not agreed >= LEAST_AGREEMENT:
            raise ValueError(self._other(shape.name, f"weights of both have the cosine {agreed:.2f}, expected above "
                                                     f"{LEAST_AGREEMENT}"))  # fmt: skip

    def _other(self, module: str, what: str) -> str:
        return (
            f"EoRA: `{self._reader.folder}` was not made from `{self._base}`: {module}: {what}. Name the "
            f"full-precision model that the checkpoint was made from."
        )
