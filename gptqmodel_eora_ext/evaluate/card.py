"""A model card for the hub: README.md with its front matter, how the model is loaded, and what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapter.summary import AdapterSummary, summarize
from ..formats.names import ADAPTER_CONFIG, MODEL_CONFIG
from ..system.files import replaced_file
from .outcome import INTERVAL_NOTE, comparisons, rows
from .record import NAME, read_record
from .size import readable, stored_modules, weight_bytes

CARD = "README.md"
# Tells a card of this command from one that somebody wrote.
MARK = "<!-- Written by `eora card`; a changed card that keeps this line is replaced the next time. -->"
# Factors of fewer bits are packed, which PEFT's layout cannot hold.
PLAIN_BITS = 16
HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
# What a base's own card says of its licence, carried over word for word.
LICENCE_KEYS = ("license", "license_name", "license_link")


class CardError(ValueError):
    """A card that cannot be written."""


@dataclass(frozen=True)
class Written:
    """A card, and what whoever publishes it should know."""

    path: Path
    notes: list[str] = field(default_factory=list)


def write_card(
    path: Path,
    *,
    data: Path | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    force: bool = False,
) -> Written:
    """Write the README.md of a checkpoint with an adapter, or of an adapter's folder.

    Args:
        path: the folder.
        data: a record of `eora eval`, for the table; None for `report.json` in the folder, if it is there.
        base_model: hub name of the full-precision model; None for what the folder says.
        licence: its identifier on the hub; None for what the base model's folder says.
        force: whether a README.md that this function has not written may be replaced.

    Raises:
        AdapterError: a ValueError, when there is no adapter, or it is broken.
        CardError: for a README.md of somebody else's, or a base model whose hub name nothing tells.
        RecordError: a ValueError, for a file that is no record.
    """
    summary = summarize(path)
    target = path / CARD
    if target.is_file() and MARK not in target.read_text(encoding="utf-8", errors="replace") and not force:
        raise CardError(f"`{target}` was written by somebody else. Pass --force to replace it, or keep it.")
    is_checkpoint = (path / MODEL_CONFIG).is_file()
    base, place = _base(path, summary, base_model)
    record = read_record(data) if data is not None else read_record(path / NAME) if (path / NAME).is_file() else None
    notes = []
    terms = {"license": licence} if licence else _licence(place)
    if not terms:
        notes.append("The card names no licence: the base model's folder with its card is not here. Pass --license.")
    if record is None:
        notes.append(f"The card has no table of results: there is no {NAME} in `{path}`. Pass --data.")
    text = _card(path, summary, base, terms, record, is_checkpoint)
    with replaced_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Written(target, notes)


def _base(path: Path, summary: AdapterSummary, asked: str | None) -> tuple[str, Path | None]:
    """The base model's hub name, and its folder where that is here."""
    config = json.loads((summary.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    told = [config.get("base_model_name_or_path")]
    if (path / MODEL_CONFIG).is_file():
        told.insert(0, json.loads((path / MODEL_CONFIG).read_text(encoding="utf-8")).get("_name_or_path"))
    folders = [Path(one) for one in told if isinstance(one, str) and Path(one).is_dir() and Path(one) != path]
    place = folders[0] if folders else None
    name = asked or next((one for one in told if _is_hub_name(one)), None)
    if name is None:
        found = ", ".join(f"`{one}`" for one in told if one) or "nothing"
        raise CardError(
            f"the card needs the hub name of the base model, and `{path}` tells {found}. Pass it: --base-model "
            f"OWNER/NAME."
        )
    if not HUB_NAME.match(name):
        raise CardError(f"--base-model is `{name}`, expected the form OWNER/NAME, such as Qwen/Qwen3-8B.")
    return name, place


def _is_hub_name(told: Any) -> bool:
    return isinstance(told, str) and bool(HUB_NAME.match(told)) and not Path(told).exists()


def _licence(place: Path | None) -> dict[str, str]:
    """What the front matter of the base's own card says of its licence; nothing where there is no card."""
    readme = place / CARD if place is not None else None
    if readme is None or not readme.is_file():
        return {}
    matter = FRONT_MATTER.search(readme.read_text(encoding="utf-8", errors="replace"))
    if matter is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(matter[1])
    except yaml.YAMLError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: found[key] for key in LICENCE_KEYS if isinstance(found.get(key), str)}


# The text ------------------------------------------------------------------------------------------------------


def _card(
    path: Path,
    summary: AdapterSummary,
    base: str,
    terms: Mapping[str, str],
    record: Mapping[str, Any] | None,
    is_checkpoint: bool,
) -> str:
    details = summary.details
    method = str(details.get("method", ""))
    modules = stored_modules(path) if is_checkpoint else []
    widths = sorted({one.bits for one in modules})
    tags = ["eora", "lora", *([method] if method else []), *(f"{bits}-bit" for bits in widths)]
    front = {
        "base_model": base,
        "base_model_relation": "quantized" if is_checkpoint else "adapter",
        "library_name": "peft",
        **terms,
        "tags": tags,
    }
    name = path.resolve().name
    ranks = sorted(set(summary.ranks.values()))
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    width = f" quantised to {' and '.join(map(str, widths))} bits" if widths else ""
    parts = [
        _front_matter(front),
        MARK,
        f"# {name}",
        f"[{base}](https://huggingface.co/{base}){width}, with an [EoRA](https://arxiv.org/abs/2410.21271) adapter: "
        f"low-rank factors that win back what quantisation loses, made without training.",
        _facts(summary, weight_bytes(path) if is_checkpoint else None, shown),
        "## How to load it",
        _loading(path, summary, is_checkpoint),
    ]
    if record is not None:
        parts += ["## What was measured", _table(record)]
    return "\n\n".join(parts) + "\n"


def _front_matter(values: Mapping[str, Any]) -> str:
    """YAML; strings are quoted as JSON, which is YAML, so that none is taken for a number or cut at a colon."""
    lines = ["---"]
    for key, value in values.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(one)}" for one in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join([*lines, "---"])


def _facts(summary: AdapterSummary, base_bytes: int | None, ranks: str) -> str:
    details = summary.details
    data = details.get("calibration") or {}
    versions = ", ".join(f"{name} {found}" for name, found in (details.get("versions") or {}).items())
    facts = {
        "weights": readable(base_bytes) if base_bytes else None,
        "adapter": f"{readable(summary.bytes)}, {len(summary.ranks)} modules, rank {ranks}, {summary.factor_bits}-bit "
                   f"factors",
        "objective": f"{details['objective']}, after {details.get('method')}" if details.get("objective") else None,
        "calibration": f"{data['tokens']} tokens, sha256 `{data['sha256']}`" if data.get("sha256") else None,
        "made by": versions or None,
    }  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items() if value)])


def _loading(path: Path, summary: AdapterSummary, is_checkpoint: bool) -> str:
    model = path.resolve().name if is_checkpoint else "CHECKPOINT"
    inside = summary.folder.resolve().relative_to(path.resolve()).as_posix() if is_checkpoint else "."
    adapter = f"{model}/{inside}" if is_checkpoint else path.resolve().name
    with_plugin = (
        f'model = GPTQModel.load("{model}")  # the adapter is found and attached' if is_checkpoint
        else f'model = GPTQModel.load("{model}", adapter=EoRA(path="{adapter}"))'
    )  # fmt: skip
    imports = "" if is_checkpoint else "from gptqmodel_eora_ext import EoRA\n"
    plugin = f"""GPTQModel with the plugin (`pip install gptqmodel-eora-ext`):

```python
from gptqmodel import GPTQModel
{imports}
{with_plugin}
```"""
    if summary.factor_bits < PLAIN_BITS:
        others = f"""The factors are packed in {summary.factor_bits} bits, which other hosts cannot read. This makes a
plain copy: `eora export {model if is_checkpoint else adapter} --peft plain`. With it, without the plugin:"""
        adapter = "plain"
    else:
        others = "The adapter is a plain PEFT LoRA folder; without the plugin:"
    stock = f'model = GPTQModel.load("{model}", adapter=Lora(path="{adapter}", rank={max(summary.ranks.values())}))'
    return f"""{plugin}

{others}

GPTQModel alone:

```python
from gptqmodel import GPTQModel
from gptqmodel.adapter.adapter import Lora

{stock}
```

Transformers and PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model}", dtype="auto"), "{adapter}")
```

vLLM, as its documentation has it (this card's maker has not run it; it wants one width of weights in all of q, k and v,
and in gate and up, and a `--max-lora-rank` that it offers):

```
vllm serve {model} --enable-lora --max-lora-rank {max(summary.ranks.values())} --lora-modules eora={adapter}
```"""


def _table(record: Mapping[str, Any]) -> str:
    """The models of a record, as `eora eval` shows them."""
    found = rows(record)
    head = ["model", "on disk"]
    texts, tasks = [one["name"] for one in record["texts"]], record["tasks"]
    for text in texts:
        head += [f"{text}: perplexity", "KL", "same next token"]
    head += [f"{task['name']} ({task['metric']})" for task in tasks]
    if record["speed"]:
        head += ["tokens/s"]
    lines = [head, ["---"] * len(head)]
    for row in found:
        cells = [row["model"], readable(row["bytes"]) if row["bytes"] else ""]
        for text in texts:
            one = row["texts"].get(text, {})
            cells += [_number(one.get("perplexity"), 2), _number(one.get("kl"), 4), _percent(one.get("same"))]
        cells += [_percent(row["tasks"].get(task["name"], {}).get("value")) for task in tasks]
        if record["speed"]:
            cells.append(_number(row.get("tokens_per_second"), 1))
        lines.append(cells)
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    notes = [f"{one['name']}: {one['windows']}." for one in record["texts"]]
    machine = record.get("machine", {})
    if machine:
        notes.append(f"Measured {record.get('made', '')} on {machine.get('processor')}, {machine.get('device')}.")
    compared = comparisons(record)
    told = "\n".join(f"- {one.sentence}" for one in compared)
    more = f"\n\n{told}\n\n({INTERVAL_NOTE}.)" if compared else ""
    return f"{table}\n\n{' '.join(notes)}{more}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
