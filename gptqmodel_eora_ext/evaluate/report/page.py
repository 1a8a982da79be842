"""The report's page: what a record says, in tables, figures and sentences, as one HTML file without a network."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...system.files import replaced_file
from ..outcome import INTERVAL_NOTE, comparisons, rows
from ..record import NAME, read_record, write_record
from ..size import readable
from ..subjects import FULL_PRECISION
from .figures import Figure, Point, bars, heat_maps, lines, trade_off
from .wording import headline

TEMPLATE = "page.html"
TITLE = "What was gained"
# `model.layers.3.mlp.experts.5.down_proj` → layer 3, module `mlp.experts.down_proj`; experts of a layer count together.
LAYER = re.compile(r"\.(\d+)\.(.+)$")
NUMBER = re.compile(r"\.\d+(?=\.|$)")
# Steps that a chart of times can show; the shortest go together.
MOST_STEPS = 16


def make_report(page: Path, data: Path | None = None) -> Path:
    """Write a report from a record.

    Args:
        page: HTML file to write.
        data: the record; None for `report.json` beside the page.

    Returns:
        The record beside the page: ``data``, or a copy of it where that lies elsewhere.

    Raises:
        RecordError: a ValueError, for a file that is no record.
        ValueError: where jinja2 or matplotlib is not installed.
    """
    require_report_libraries()
    beside = page.with_name(NAME)
    source = data or beside
    record = read_record(source)
    page.parent.mkdir(parents=True, exist_ok=True)
    if source.resolve().parent != page.resolve().parent:
        write_record(beside, record)
        source = beside
    html = render(record, source.name)
    with replaced_file(page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return source


def render(record: Mapping[str, Any], data_name: str = NAME) -> str:
    """The page of a record; ``data_name`` is the record's file, which the page links to."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    found = rows(record)
    compared = comparisons(record)
    adapted = [model for model in record["models"] if model.get("adapter")]
    return template.render(
        title=record.get("title") or TITLE,
        headline=headline(record),
        made=record.get("made", ""),
        rows=found,
        texts=record["texts"],
        tasks=record["tasks"],
        has_speed=bool(record["speed"]),
        comparisons=[one.sentence for one in compared],
        interval=INTERVAL_NOTE,
        sizes=[_sizes(model) for model in record["models"] if model.get("quantised")],
        trade_off=_trade_off(record, found),
        adapters=[_adapter(model, number) for number, model in enumerate(adapted)],
        samples=record["samples"],
        written_tokens=record.get("settings", {}).get("written_tokens"),
        stages=_stages(record["stages"]),
        facts=_facts(record),
        data_name=data_name,
        size=readable,
        share=lambda value: "" if value is None else f"{100 * value:.1f} %",
        number=lambda value, digits: "" if value is None else f"{value:.{digits}f}",
    )


# Sections ------------------------------------------------------------------------------------------------------


def _sizes(model: Mapping[str, Any]) -> dict[str, Any]:
    """The table of sizes: the base, its adapter, and what other ranks and widths would take."""
    quantised = model["quantised"]
    table = quantised["table"]
    total = model["bytes"] + model["adapter_bytes"]
    lines_ = [("this checkpoint", model["bytes"], model["adapter_bytes"], total)]
    for one in table["adapters"]:
        name = f"rank {one['rank']}, {one['factor_bits']}-bit factors"
        lines_.append((name, model["bytes"], one["bytes"], one["total"]))
    plain = table["plain"]
    return {
        "name": model["name"],
        "widths": ", ".join(f"{count} modules at {bits} bits" for bits, count in quantised["widths"].items()),
        "bits_per_weight": quantised["bits_per_weight"],
        "group_size": quantised["group_size"],
        "lines": [
            {
                "name": name, "base": base, "adapter": adapter, "total": whole,
                "beside": {bits: whole / nbytes for bits, nbytes in plain.items() if bits != "2"},
            }
            for name, base, adapter, whole in lines_
        ],
        "plain": [{"name": f"plain {bits} bits", "total": nbytes} for bits, nbytes in plain.items()],
    }  # fmt: skip


def _trade_off(record: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> Figure | None:
    full = next((row for row in found if row["kind"] == FULL_PRECISION), None)
    quantised = [row for row in found if row["kind"] != FULL_PRECISION and row["bytes"]]
    if full is None or not quantised or not record["texts"]:
        return None
    panels = {}
    for text in record["texts"]:
        name = text["name"]
        losses = {row["model"]: row["texts"][name]["nats"] - full["texts"][name]["nats"] for row in quantised}
        panels[name] = [
            Point(row["model"], row["bytes"], losses[row["model"]], _is_dominated(row, quantised, losses))
            for row in quantised
        ]
    told = "; ".join(
        f"{text}: " + ", ".join(f"{one.name} {readable(one.bytes)} loses {one.loss:.2f}" for one in points)
        for text, points in panels.items()
    )
    return trade_off(panels, f"Loss above full precision in nats a token against size. {told}.")


def _is_dominated(row: Mapping[str, Any], rows_: Sequence[Mapping[str, Any]], losses: Mapping[str, float]) -> bool:
    """Whether another model is no larger and no worse."""
    own = (row["bytes"], losses[row["model"]])
    others = [(one["bytes"], losses[one["model"]]) for one in rows_ if one is not row]
    return any(one[0] <= own[0] and one[1] <= own[1] and one != own for one in others)


def _adapter(model: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Ranks, errors and spectra of an adapter."""
    adapter, name = model["adapter"], model["name"]
    figures = []
    if adapter["errors"]:
        kinds, before = _grid({module: pair[0] for module, pair in adapter["errors"].items()})
        _, after = _grid({module: pair[1] for module, pair in adapter["errors"].items()})
        means = [statistics.fmean(pair[place] for pair in adapter["errors"].values()) for place in (0, 1)]
        which = "as it was before refinement" if adapter.get("refined") else "with it"
        figures.append(heat_maps(
            f"errors-{number}", "Error of each module's output, before and after",
            f"Mean over modules of {name}: {means[0]:.3f} without the adapter, {means[1]:.3f} {which}, as a share of "
            f"the output's size on calibration data.",
            {"without the adapter": before, which: after}, kinds, "E‖ΔW x‖² / E‖W x‖²",
        ))  # fmt: skip
    kinds, ranks = _grid({module: float(rank) for module, rank in adapter["ranks"].items()})
    values = list(adapter["ranks"].values())
    if kinds:
        figures.append(heat_maps(
            f"ranks-{number}", "Rank of each module",
            f"Ranks of {name} go from {min(values)} to {max(values)}, median {statistics.median(values):g}.",
            {"rank": ranks}, kinds, "components",
        ))  # fmt: skip
    curves = _spectra(adapter["spectra"])
    if curves:
        figures.append(lines(
            f"spectra-{number}", "Spectra of the correction",
            f"Singular values of B A of {name}, median over layers, for each kind of module: what each component adds.",
            curves, "component", "singular value",
        ))  # fmt: skip
    data = adapter.get("calibration") or {}
    return {
        "name": name,
        "figures": figures,
        "facts": {
            "objective": adapter.get("objective"),
            "factors": f"{adapter['factor_bits']} bits",
            "ranks": f"{min(values)} to {max(values)}" if values else None,
            "error left": None
            if adapter.get("error_left") is None
            else f"{100 * adapter['error_left']:.1f} % of the weighted error (geometric mean over modules)",
            "calibration": f"{data['tokens']} tokens, sha256 {data['sha256']}" if data.get("sha256") else None,
            "refined": None if not adapter.get("refined") else _refinement(adapter["refined"]),
            "seconds of compensation": None
            if adapter.get("seconds") is None
            else f"{adapter['seconds']:.0f}, summed over threads",
            "made by": ", ".join(f"{one} {which}" for one, which in (adapter.get("versions") or {}).items()) or None,
        },
    }


def _refinement(told: Mapping[str, Any]) -> str:
    return (f"by {told['loss']} on {told['tokens']} tokens, {told['steps']} steps; validation loss "
            f"{told['before']:.4f}, then {told['after']:.4f}")  # fmt: skip


def _grid(values: Mapping[str, float]) -> tuple[list[str], list[list[float]]]:
    """Layers × kinds of modules; means where several modules of a layer are of one kind (experts)."""
    cells: dict[tuple[int, str], list[float]] = {}
    for module, value in values.items():
        match = LAYER.search(module)
        if match:
            cells.setdefault((int(match[1]), NUMBER.sub("", f".{match[2]}")[1:]), []).append(value)
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    short = [kind.rsplit(".", 1)[-1] for kind in kinds]
    names = short if len(set(short)) == len(short) else kinds
    layers = range(max((layer for layer, _ in cells), default=-1) + 1)
    grid = [
        [statistics.fmean(cells[layer, kind]) if (layer, kind) in cells else math.nan for kind in kinds]
        for layer in layers
    ]
    return names, grid


def _spectra(spectra: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """For each kind of module the median over layers, as far as most of them have components."""
    kinds: dict[str, list[Sequence[float]]] = {}
    for module, values in spectra.items():
        if any(values):
            kinds.setdefault(module.rsplit(".", 1)[-1], []).append([value for value in values if value > 0])
    found = {}
    for kind, some in kinds.items():
        length = int(statistics.median(len(values) for values in some))
        found[kind] = [
            statistics.median(values[place] for values in some if len(values) > place) for place in range(length)
        ]
    return found


def _stages(stages: Sequence[Mapping[str, Any]]) -> Figure | None:
    if not stages:
        return None
    spent: dict[str, float] = {}
    for stage in stages:
        spent[stage["name"]] = spent.get(stage["name"], 0.0) + stage["seconds"]
    if len(spent) > MOST_STEPS:
        longest = sorted(spent, key=lambda name: -spent[name])[: MOST_STEPS - 1]
        others = sum(seconds for name, seconds in spent.items() if name not in longest)
        spent = {name: seconds for name, seconds in spent.items() if name in longest} | {"all others": others}
    told = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent.items())
    return bars("stages", "Time spent", f"Seconds by step: {told}.", spent, "seconds")


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """Settings, versions, machine and fingerprints: what it takes to measure again."""
    settings = {name: value for name, value in record.get("settings", {}).items() if value is not None}
    versions, machine = record.get("versions", {}), record.get("machine", {})
    found = {
        "settings": ", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items()),
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "machine": ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None),
    }
    for one in (*record["texts"], *record["tasks"]):
        if one.get("sha256"):
            found[f"{one['name']} (sha256)"] = one["sha256"]
    return {name: value for name, value in found.items() if value}


def require_report_libraries() -> None:
    """Refuse to begin where a report could not be made in the end.

    Raises:
        ValueError: naming what is missing and how to get it.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"A report needs {error.name}: pip install 'gptqmodel-eora-ext[report]'.") from None
