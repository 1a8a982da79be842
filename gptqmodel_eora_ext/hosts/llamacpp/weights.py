"""Ŵ of a full-precision model's modules, read from a GGUF file as they are needed.

Names say where a module's weight should lie. Whether it is that module's weight, and in which order its rows lie, is
found by comparing it with W: quantised weights resemble the weights that they were made from and no others.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...formats.gguf.header import TensorInfo
from ...formats.gguf.model import FLOATING, GGUFModel
from ...formats.sizes import ModuleShape
from ..base_check import LEAST_AGREEMENT, agreement
from ..jobs import KnownWeights, ReadWeight
from .names import Place, TensorNames, rotary_order

log = logging.getLogger(__name__)

# Rows that are compared before the run. They are taken evenly from all of the matrix.
SAMPLED_ROWS = 64
LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Placed:
    """A module and its weight in the file.

    Attributes:
        shape: of the module.
        place: where its weight lies.
        order: the model's rows in the file's order; None where both have the same.
    """

    shape: ModuleShape
    place: Place
    order: torch.Tensor | None

    def in_file_order(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the model (out × …) as the file has them."""
        return rows if self.order is None else rows[self.order]

    def in_model_order(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the file (out × …) as the model has them."""
        if self.order is None:
            return rows
        result = torch.empty_like(rows)
        result[self.order] = rows
        return result


class GGUFWeights:
    """Finds a model's modules in a file.

    Args:
        model: the file.
        base: what the full-precision model is called, for messages.

    Attributes:
        placed: full module name → its quantised weight in the file, once `known` was asked.
    """

    def __init__(self, model: GGUFModel, base: str) -> None:
        self.model = model
        self.placed: dict[str, Placed] = {}
        self._base = base
        self._names = TensorNames(model)

    def known(self, shapes: Sequence[ModuleShape], read: ReadWeight) -> KnownWeights:
        """What gives Ŵ of each quantised module.

        Before any layer is run, all names and shapes are compared, and some rows of the modules in the first and the
        last layer; every other module is compared when it is asked for.

        Raises:
            ValueError: where the file is not of this model.
        """
        quantized = [shape for shape in shapes if self._info(shape).type not in FLOATING]
        if not quantized:
            raise ValueError(
                f"EoRA: `{self.model.path}` holds no quantised weight of the {len(shapes)} linear modules of "
                f"`{self._base}`. Name the quantised file."
            )
        self.locate(quantized, read)
        self._tell_left_out()
        return {name: self._reader(one) for name, one in self.placed.items()}

    def locate(self, shapes: Sequence[ModuleShape], read: ReadWeight) -> Mapping[str, Placed]:
        """Where modules lie, whatever their type; compared as in `known`.

        Raises:
            ValueError: where the file is not of this model.
        """
        ordered = self._with_orders([self._find(shape) for shape in shapes], read)
        self.placed = {one.shape.name: one for one in ordered}
        return self.placed

    def sharing(self, name: str) -> str | None:
        """The tensor in which a module lies with the other experts of its layer, with which it shares a type and a
        rank; None for a module that has a tensor of its own."""
        placed = self.placed.get(name)
        return placed.place.tensor if placed is not None and placed.place.expert is not None else None

    def _info(self, shape: ModuleShape) -> TensorInfo:
        return self.model.info(self._find(shape).place.tensor)

    def _find(self, shape: ModuleShape) -> Placed:
        """Where a module lies, its rows in the model's own order."""
        place = self._names.place(shape.name)
        info = self.model.tensors.get(place.tensor) if place is not None else None
        if place is None or info is None:
            what = f"no tensor {place.tensor}" if place is not None else f"no name for it ({self.model.architecture})"
            raise ValueError(self._other(shape.name, f"the file has {what}"))
        expected = (shape.out_features, shape.in_features)
        if info.shape[-2:] != expected or (len(info.shape) == 3) != (place.expert is not None):
            found, wanted = (" × ".join(map(str, one)) for one in (info.shape, expected))
            raise ValueError(self._other(shape.name, f"{place.tensor} is {found}, expected {wanted}"))
        if place.expert is not None and place.expert >= info.shape[0]:
            raise ValueError(self._other(shape.name, f"{place.tensor} holds {info.shape[0]} experts"))
        return Placed(shape, place, None)

    def _with_orders(self, placed: Sequence[Placed], read: ReadWeight) -> list[Placed]:
        """The order of rows is the same in all layers, so it is looked for in the first and checked in the last."""
        layers = [_layer(one.shape.name) for one in placed]
        rotary = {}
        for one, layer in zip(placed, layers, strict=True):
            if layer != layers[0]:
                break
            rotary[_kind(one)] = self._order_of(one, layer, read) is not None
        result = [
            Placed(one.shape, one.place, self._rotary(one, layer) if rotary.get(_kind(one)) else None)
            for one, layer in zip(placed, layers, strict=True)
        ]
        for one, layer in zip(result, layers, strict=True):
            if layer == layers[-1] != layers[0]:
                rows = _sampled(one.shape.out_features)
                self._check(one, self._rows(one, one.order, rows), read(one.shape.name)[rows])
        return result

    def _order_of(self, one: Placed, layer: int, read: ReadWeight) -> torch.Tensor | None:
        """The order of rows in which a module agrees best with W; None for the model's own.

        Raises:
            ValueError: where it agrees in none.
        """
        rows = _sampled(one.shape.out_features)
        weight = read(one.shape.name)[rows]
        order = None
        rotary = self._rotary(one, layer)
        if rotary is not None:
            plain, rotated = (agreement(self._rows(one, tried, rows), weight) for tried in (None, rotary))
            order = rotary if rotated > plain else None
        self._check(Placed(one.shape, one.place, order), self._rows(one, order, rows), weight)
        return order

    def _rotary(self, one: Placed, layer: int) -> torch.Tensor | None:
        """The order for q and k in which llama.cpp rotates neighbours; None where the heads do not fit."""
        heads = self.model.heads(layer, of_keys=".attn_k." in one.place.tensor)
        if heads is None or ".attn_" not in one.place.tensor or one.shape.out_features % (2 * heads):
            return None
        return rotary_order(one.shape.out_features, heads)

    def _rows(self, one: Placed, order: torch.Tensor | None, rows: Sequence[int]) -> torch.Tensor:
        """Some of the model's rows of Ŵ, if the file has them in this order."""
        places = list(rows)
        if order is not None:
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(len(order))
            places = inverse[places].tolist()
        return self.model.read(one.place.tensor, places, expert=one.place.expert)

    def _reader(self, one: Placed) -> Callable[[torch.Tensor], torch.Tensor]:
        def read(weight: torch.Tensor) -> torch.Tensor:
            found = one.in_model_order(self.model.read(one.place.tensor, expert=one.place.expert))
            self._check(one, found, weight)
            return found

        return read

    def _check(self, one: Placed, found: torch.Tensor, weight: torch.Tensor) -> None:
        agreed = agreement(found, weight.to(found.device, torch.float32))
        if not agreed >= LEAST_AGREEMENT:
            raise ValueError(
                self._other(
                    one.shape.name,
                    f"its weights and {one.place.tensor} ({self.model.info(one.place.tensor).type}) have the cosine "
                    f"{agreed:.2f}, expected above {LEAST_AGREEMENT}",
                )
            )

    def _other(self, module: str, what: str) -> str:
        return (
            f"EoRA: `{self.model.path}` was not quantised from `{self._base}`: {module}: {what}. "
            f"Name the full-precision model that the file was made from."
        )

    def _tell_left_out(self) -> None:
        """Name quantised matrices in layers that no module of the loop stands for."""
        served = {one.place.tensor for one in self.placed.values()}
        left_out = [info.name for info in self.model.linear() if info.name not in served]
        kinds = sorted({re.sub(r"blk\.\d+\.", "", name) for name in left_out})
        if kinds:
            log.warning("EoRA: these quantised tensors of `%s` stay without an adapter: %s.", self.model.path,
                        ", ".join(kinds))  # fmt: skip


def _kind(one: Placed) -> str:
    return re.sub(r"blk\.\d+\.", "", one.place.tensor)


def _layer(name: str) -> int:
    found = LAYER.search(name)
    return int(found[1]) if found else 0


def _sampled(rows: int) -> list[int]:
    count = min(SAMPLED_ROWS, rows)
    return sorted({index * (rows - 1) // max(count - 1, 1) for index in range(count)})
