"""`report.json`: what an evaluation measured, every item of every model. Tables and the report are made from it.

format      "eora-report-1"
title       what the report is called; optional
settings    windows, limits, shots, batch size
made        UTC, with `versions` and `machine`
models      name, kind, path, bytes, adapter_bytes; `quantised` (widths, bits per weight, the table of sizes) and
            `adapter` (ranks, errors, spectra, calibration) where there are
texts       name, file, sha256, windows; `results`: per model `nats` and `tokens` of each window, and beside the
            full-precision model `same` (tokens with the same likeliest one) and `kl` (Σ KL in nats; null beyond the
            windows that it is taken on)
tasks       name, file, sha256, metric; `results`: per model `value`, `metrics`, and `items`: id, value, given
speed       per model tokens_per_second, runs, peak_bytes
samples     prompt; `results`: per model the text
stages      name and seconds of each step
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..system.files import write_json

FORMAT = "eora-report-1"
NAME = "report.json"
LISTS = ("models", "texts", "tasks", "speed", "samples", "stages")
# Fields that every entry of a list has.
FIELDS = {
    "models": ("name", "kind", "path", "bytes", "adapter_bytes"),
    "texts": ("name", "windows", "results"),
    "tasks": ("name", "metric", "results"),
    "speed": ("model", "tokens_per_second", "peak_bytes"),
    "samples": ("prompt", "results"),
    "stages": ("name", "seconds"),
}
# Bytes of a file that are read at a time.
BLOCK_BYTES = 1 << 20


class RecordError(ValueError):
    """A file that is no record of an evaluation."""


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record; the old file or the whole new one is there at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def read_record(path: Path) -> dict[str, Any]:
    """Read what `write_record` wrote.

    Raises:
        RecordError: for a file that is missing, no JSON, of another format, or without a field; it names both.
    """
    remedy = "Make one with `eora eval … --out report.json`."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"`{path}` cannot be read: {error.strerror}. {remedy}") from None
    except ValueError as error:
        raise RecordError(f"`{path}` is no JSON: {error}. {remedy}") from None
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT:
        raise RecordError(f"`{path}` has the format {found!r}, expected {FORMAT!r}. {remedy}")
    for kind in LISTS:
        entries = content.get(kind)
        if not isinstance(entries, list):
            raise RecordError(f"`{path}`: `{kind}` is {type(entries).__name__}, expected a list. {remedy}")
        for number, entry in enumerate(entries):
            missing = [name for name in FIELDS[kind] if not isinstance(entry, dict) or name not in entry]
            if missing:
                raise RecordError(f"`{path}`: `{kind}[{number}]` has no {', '.join(missing)}. {remedy}")
    if not content["models"]:
        raise RecordError(f"`{path}` holds no models. {remedy}")
    names = {one["name"] for one in content["models"]}
    for kind in ("texts", "tasks", "samples"):
        for entry in content[kind]:
            strange = next((one.get("model") for one in entry["results"] if one.get("model") not in names), None)
            if strange is not None:
                raise RecordError(f"`{path}`: `{kind}` tells of `{strange}`, which `models` does not name. {remedy}")
    return content


def file_sha256(path: Path) -> str:
    """The fingerprint of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
