"""A nested state (dicts, lists, tuples, numbers, strings, tensors) as JSON and tensors, also in one safetensors file.

The tensors are the file's tensors; all the rest stands as JSON in its header. Reading one executes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .tensor_file import write_tensors

STATE = "state"
# How what is no plain JSON is written: a list that begins with one of these.
TENSOR, KNOWN, DEVICE, TUPLE, LIST, DICT = "tensor", "known", "device", "tuple", "list", "dict"


def write_state(path: Path, state: Any, known: Mapping[int, str] | None = None) -> None:
    """Write a state, and bring it to the disk. A tensor that stands in it several times is written once.

    Args:
        path: the file.
        state: nested dicts (keys are strings or integers), lists, tuples, None, bool, int, float, str, tensors and
            devices.
        known: `id` of a tensor → a name for it, of tensors that `read_state` will be given and that are not written.

    Raises:
        TypeError: for a state that holds anything else.
        OSError: when the file cannot be written.
    """
    described, tensors = taken_apart(state, known)
    write_tensors(path, tensors, {STATE: json.dumps(described)})


def state_bytes(state: Any, known: Mapping[int, str] | None = None) -> int:
    """Bytes of the tensors that `write_state` would write."""
    return sum(one.nbytes for one in taken_apart(state, known)[1].values())


def read_state(path: Path, known: Mapping[str, torch.Tensor] | None = None) -> Any:
    """Read what `write_state` has written; tensors are on the device that they were on.

    Args:
        path: the file.
        known: the tensors that were not written, by the names that they were given.

    Raises:
        SafetensorError, OSError, ValueError, KeyError: for a file that is missing or damaged.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return put_together(json.loads(file.metadata()[STATE]), tensors, known)


def taken_apart(state: Any, known: Mapping[int, str] | None = None) -> tuple[Any, dict[str, torch.Tensor]]:
    """What `put_together` makes a state of again: JSON, and the tensors that it names.

    Args:
        state, known: see `write_state`.

    Raises:
        TypeError: see there.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _encoded(state, tensors, {}, known or {}), tensors


def put_together(
    described: Any,
    tensors: Mapping[str, torch.Tensor],
    known: Mapping[str, torch.Tensor] | None = None,
    *,
    stays: bool = False,
) -> Any:
    """The state that `taken_apart` was given.

    Args:
        described: the JSON.
        tensors: by the names in it.
        known: the tensors that stand in it by name alone, by the names that they were given.
        stays: whether tensors stay where they are; otherwise each goes to the device that it was on.

    Raises:
        ValueError, KeyError: for JSON that is damaged, or names a tensor that is not there.
    """
    return _decoded(described, tensors, known or {}, stays)


def _encoded(value: Any, tensors: dict[str, torch.Tensor], names: dict[int, str], known: Mapping[int, str]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        if id(value) in known:
            return [KNOWN, known[id(value)]]
        if value.is_meta:
            raise TypeError("a tensor on the meta device has no values to keep")
        name = names.setdefault(id(value), str(len(names)))
        tensors[name] = value
        return [TENSOR, name, str(value.device)]
    if isinstance(value, torch.device):
        return [DEVICE, str(value)]
    if isinstance(value, (tuple, list)):
        return [TUPLE if isinstance(value, tuple) else LIST, *(_encoded(one, tensors, names, known) for one in value)]
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return [DICT, *([key, _encoded(one, tensors, names, known)] for key, one in value.items())]
    raise TypeError(f"{type(value).__name__} cannot be kept in a state file")


def _decoded(
    value: Any, tensors: Mapping[str, torch.Tensor], known: Mapping[str, torch.Tensor], stays: bool
) -> Any:
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == TENSOR:
        return tensors[rest[0]] if stays else tensors[rest[0]].to(rest[1])
    if kind == KNOWN:
        return known[rest[0]]
    if kind == DEVICE:
        return torch.device(rest[0])
    if kind == DICT:
        return {key: _decoded(one, tensors, known, stays) for key, one in rest}
    if kind not in (TUPLE, LIST):
        raise ValueError(f"a state file holds a {kind!r}, which this version does not know")
    found = [_decoded(one, tensors, known, stays) for one in rest]
    return tuple(found) if kind == TUPLE else found
