"""What processes that share a run agree on before they begin, and by what its modules are dealt out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..system.group import Group
from .run import LIBRARIES


def check_enough(windows: int, processes: int, what: str) -> None:
    """Refuse fewer windows than processes.

    Raises:
        ValueError: naming both.
    """
    if windows < processes:
        raise ValueError(
            f"EoRA: {windows} {what} cannot be shared out between {processes} processes: each needs at least one. Pass "
            f"more calibration data, a smaller batch size, or start fewer processes."
        )


def check_same(
    group: Group, model: str, host: str, options: Mapping[str, Any], windows: Iterable[Mapping[str, Any]]
) -> None:
    """Refuse to begin where processes were given different models, data, options or versions.

    Args:
        group: the processes.
        model: a folder; of a hub's name the name is compared.
        host: the host's distribution, whose version is compared.
        options: whatever decides the result; anything that has a text.
        windows: calibration: `input_ids` of each.

    Raises:
        ValueError: naming what differs and the ranks.
    """
    digest = hashlib.sha256()
    count = 0
    for window in windows:
        digest.update(json.dumps([int(one) for one in _flat(window["input_ids"])]).encode())
        count += 1
    told = {f"option {name}": str(value) for name, value in options.items()}
    told |= {f"version of {name}": version(name) for name in (host, *LIBRARIES)}
    told["version of gptqmodel-eora-ext"] = __version__
    told["calibration data"] = f"{count} windows, sha256 {digest.hexdigest()[:16]}"
    told["model"] = fingerprint(model)
    group.agree(told)


def _flat(ids: Any) -> list[int]:
    flat = ids.flatten().tolist() if hasattr(ids, "flatten") else ids
    return [one for row in flat for one in row] if flat and isinstance(flat[0], list) else list(flat)


def fingerprint(model: str) -> str:
    """A folder's config and the names, sizes and first bytes of its weight files; of anything else its name.

    The head of a safetensors file names every tensor with its shape; the weights themselves are not read.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size if path.suffix == '.safetensors' else ''}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
            if path.suffix == ".safetensors" and size > 1 << 17:
                file.seek(size - (1 << 16))
                digest.update(file.read())
    return f"sha256 {digest.hexdigest()[:16]}"
