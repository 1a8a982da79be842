"""How near are forecast errors to those of GPTQModel's own loop, module by module?

The first layers of the model are quantised with small adapters, whose `eora.json` tells every module's error without
them. Beside it: what `eora plan` forecasts from the full-precision model's inputs before anything is quantised, and
what rounding to nearest on the same grid would leave.

And do predicted losses rank measured ones? `recovery.py`'s results hold losses of plain models and of uniform ranks,
which are predicted here as `eora plan` predicts them, and with gradients and inputs taken to be independent. By kind of
module: what it costs to replace all modules of a kind, and nothing else, by their 2-bit selves with an adapter,
measured and predicted.

    python benchmarks/forecast.py --json
    python benchmarks/forecast.py --parts errors --layers 4
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import common
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import AdapterCache

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.hosts.gptqmodel.modules import layered, module_shapes
from gptqmodel_eora_ext.hosts.gptqmodel.survey import survey_model
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.plan import plan_question, planned_modules
from gptqmodel_eora_ext.plan.forecast import with_components
from gptqmodel_eora_ext.plan.layered import LayeredModel
from gptqmodel_eora_ext.plan.ranks import kind_of
from gptqmodel_eora_ext.plan.rows import moment_of
from gptqmodel_eora_ext.plan.survey import (
    KIND_TOKENS,
    SENSITIVITY_TOKENS,
    cached_sensitivity,
    first_tokens,
    unseen_tokens,
)
from gptqmodel_eora_ext.plan.sweep import layer_inputs, module_moments
from gptqmodel_eora_ext.solve import Grid, column_order, diagonal_of, error_loss, gptq

SAMPLES, SEQLEN = 32, 256
GRID = Grid(group_size=64, sym=True, scale_search=2.4)
# Small enough to change little for the modules that follow.
RANK = 8
PARTS = ("errors", "losses", "kinds")
# One of 2 bits and a rank of 0.5 bits per weight in 4-bit factors.
KIND_BITS, KIND_RANK, KIND_WINDOWS = 2, 40, 8


def found(model: common.Subject, bits: int) -> dict[str, float]:
    """Relative error of every module's output, as the loop finds it: E‖ΔW x‖² / E‖W x‖²."""
    with common.scratch() as folder, quiet():
        AdapterCache.reset()
        config = QuantizeConfig(bits=bits, group_size=GRID.group_size, sym=GRID.sym, mse=GRID.scale_search)
        host = GPTQModel.load(str(model.folder), config)
        calibration = common.calibration(model, SAMPLES, SEQLEN)
        host.quantize(calibration, batch_size=common.BATCH_SIZE, adapter=EoRA(rank=RANK))
        host.save(str(folder / "model"))
        modules = json.loads((folder / "model" / "eora" / "eora.json").read_text())["modules"]
    return {name: report["error_before"] / report["signal"] for name, report in modules.items()}


def forecast(model: common.Subject, bits: tuple[int, ...]) -> dict[str, dict[str, dict[int, float]]]:
    """The same, forecast: by method, module and width."""
    errors: dict[str, dict[str, dict[int, float]]] = {"GPTQ": {}, "nearest": {}}
    with quiet():
        dense, names = opened(model)
    windows = dense.begin(first_tokens(common.calibration(model, SAMPLES, SEQLEN), SENSITIVITY_TOKENS))
    for layer in layer_inputs(dense, names, windows):
        moments = {leader: moment_of(rows, leader) for leader, rows in layer.rows.items()}
        for name, linear in layer.linears.items():
            weight, moment = linear.weight.detach().float(), moments[layer.leaders[name]]
            ones = torch.ones(len(weight), device=weight.device)
            signal = error_loss(weight, moment, ones)
            for method, known in (("GPTQ", moment), ("nearest", diagonal_of(moment))):
                rounded = gptq(weight, column_order(known, GRID.group_size), bits, GRID)
                errors[method][name] = {
                    width: error_loss(weight - one, moment, ones) / signal
                    for width, one in zip(bits, rounded, strict=True)
                }
    return errors


def opened(model: common.Subject) -> tuple[LayeredModel, list[str]]:
    """The model, to be run layer by layer, and the names of what GPTQModel would quantise."""
    host = GPTQModel.load(str(model.folder), QuantizeConfig(bits=2, group_size=GRID.group_size))
    shapes = module_shapes(host)
    return layered(host, shapes), [shape.name for shape in shapes]


def predicted_losses(model: common.Subject) -> dict[str, Any]:
    """Cells of `recovery.py` with equal settings: predicted and measured loss above the full-precision model's."""
    recovery = common.kept(model.results("recovery"))
    if not recovery:
        raise SystemExit(f"{model.results('recovery')} is missing, whose losses are predicted. Run recovery.py first.")
    cells = [run for run in recovery["runs"] if run["kind"] in ("none", "ours")]
    most = max(run["rank"] for run in cells)
    with quiet():
        host = GPTQModel.load(str(model.folder), QuantizeConfig(bits=2, group_size=GRID.group_size))
        shapes = module_shapes(host)
    rows = [{"bits": run["bits"], "rank": run["rank"], "factor_bits": run.get("factor_bits", 16)} for run in cells]
    for bits, mse in recovery["setup"]["mse"].items():
        grid, width = Grid(recovery["setup"]["group_size"], True, mse), int(bits)
        question = plan_question(shapes, grid, most=most, swept=width, bits=(width,))
        for name, weighed in (("predicted", True), ("independent", False)):
            asked = replace(question, weighed=weighed)
            with quiet():
                found = survey_model(host, shapes, common.calibration(model, SAMPLES, SEQLEN), asked, kind="fisher")
            modules = planned_modules(shapes, found)
            for row in rows:
                if row["bits"] == width:
                    row[name] = sum(module.loss(width, row["rank"], row["factor_bits"]) for module in modules)
    texts = common.common_texts(recovery["full"], *(run["loss"] for run in cells))
    for row, run in zip(rows, cells, strict=True):
        row |= {text: run["loss"][text] - recovery["full"][text] for text in texts}
    correlations = {
        name: {text: common.rank_correlation([row[name] for row in rows], [row[text] for row in rows])
               for text in texts}
        for name in ("predicted", "independent")
    }  # fmt: skip
    return {"rank correlations": correlations, "cells": rows}


def losses_by_kind(model: common.Subject) -> list[dict[str, Any]]:
    """One row a kind of module (`q_proj`): loss above full precision.

    Predicted, as a divergence on calibration tokens that predictions stand on and on others, and on held-out text.
    """
    calibration = common.calibration(model, SAMPLES, SEQLEN)
    with quiet():
        opened_model, names = opened(model)
        sensitivity = cached_sensitivity(opened_model, names, calibration, kind="fisher")
    dense, texts = common.base_model(model), common.held_out(model)
    full = common.losses(dense, texts, KIND_WINDOWS)
    divergences = {
        "on tokens seen": divergence_from(dense, first_tokens(calibration, KIND_TOKENS)),
        "on others": divergence_from(dense, unseen_tokens(calibration)),
    }
    compensated: dict[str, dict[str, torch.Tensor]] = {}
    rows: dict[str, dict[str, Any]] = {}
    windows = opened_model.begin(first_tokens(calibration, SENSITIVITY_TOKENS))
    tokens = sum(int(window.keep.sum()) for window in windows)
    for layer in layer_inputs(opened_model, names, windows):
        for name, linear in layer.linears.items():
            weight, read = linear.weight.detach().float(), layer.rows[layer.leaders[name]]
            known = module_moments(name, weight, moment_of(read, name), read, tokens, sensitivity)
            [quantized] = gptq(weight, column_order(known.inputs, GRID.group_size), [KIND_BITS], GRID)
            corrected, lora_A, lora_B = with_components(weight - quantized, known, KIND_RANK, KIND_RANK)
            kind = kind_of(name)
            compensated.setdefault(kind, {})[name] = (quantized + lora_B.float() @ lora_A.float()).to(torch.bfloat16)
            row = rows.setdefault(kind, {"kind": kind, "independent": 0.0, "corrected": 0.0})
            independent = with_components(weight - quantized, replace(known, weighted=None), KIND_RANK, 0)[0]
            for column, one in (("independent", independent), ("corrected", corrected)):
                row[column] += one.left(KIND_RANK)
    for kind, weights in compensated.items():
        kept = {name: dense.get_submodule(name).weight.data for name in weights}
        for name, weight in weights.items():
            dense.get_submodule(name).weight.data = weight
        rows[kind] |= {column: divergence() for column, divergence in divergences.items()}
        measured = common.losses(dense, texts, KIND_WINDOWS)
        for name, weight in kept.items():
            dense.get_submodule(name).weight.data = weight
        rows[kind] |= {text: measured[text] - full[text] for text in full}
        mean = sum(rows[kind][text] for text in full) / len(full)
        for column in ("independent", "corrected", "on others"):
            rows[kind][f"measured / {column}"] = mean / rows[kind][column]
    return list(rows.values())


@torch.no_grad()
def divergence_from(model: Any, batches: list[dict[str, torch.Tensor]]) -> Callable[[], float]:
    """What tells how far the model's scores have gone from what they are now, in nats a token."""

    def scores() -> torch.Tensor:
        return torch.cat([model(**one).logits[one["attention_mask"].bool()] for one in batches]).float().log_softmax(-1)

    before = scores()

    @torch.no_grad()
    def divergence() -> float:
        return float((before.exp() * (before - scores())).sum(-1).mean())

    return divergence


def measured_errors(whole: common.Subject, layers: int) -> dict[str, Any]:
    """Forecast errors over those found, module by module."""
    widths = (2, 3)
    rows: list[dict[str, Any]] = []
    with common.scratch() as folder:
        model = common.first_layers(whole, layers, folder) if layers else whole
        forecasts = forecast(model, widths)
        for bits in widths:
            for name, error in found(model, bits).items():
                guesses = {method: known[name][bits] for method, known in forecasts.items()}
                rows.append({"module": name, "bits": bits, "found": error, **guesses})
    summary = []
    for bits in widths:
        for method in ("GPTQ", "nearest"):
            logs = [math.log(row[method] / row["found"]) for row in rows if row["bits"] == bits]
            mean = sum(logs) / len(logs)
            spread = math.sqrt(sum((one - mean) ** 2 for one in logs) / len(logs))
            summary.append(
                {
                    "bits": bits,
                    "forecast": method,
                    "forecast / found, geometric mean": math.exp(mean),
                    "spread, a factor of": math.exp(spread),
                    "least": math.exp(min(logs)),
                    "most": math.exp(max(logs)),
                }
            )
    return {"layers": layers, "summary": summary, "modules": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--layers", type=int, default=4, dest="errors_layers",
                        help="first layers of the model, for errors; 0 for all")  # fmt: skip
    common.add_model(parser, layers=False)
    options = parser.parse_args()

    setup = {"samples": SAMPLES, "seqlen": SEQLEN, "group_size": GRID.group_size, "mse": GRID.scale_search}
    measure: dict[str, Callable[[common.Subject], dict[str, Any]]] = {
        "errors": lambda model: measured_errors(model, options.errors_layers),
        "losses": predicted_losses,
        "kinds": lambda model: {"rows": losses_by_kind(model)},
    }
    with common.subject(options) as model:
        path = model.results("forecast")
        result = common.kept(path)
        for part in options.parts:
            found = measure[part](model)
            result[part] = {"measured": common.measured(model), "setup": setup, **found}
            common.keep(path, result)
    common.keep(path, result, as_json=options.json)
    for part, table in (("errors", "summary"), ("losses", "cells"), ("kinds", "rows")):
        if rows := result.get(part, {}).get(table):
            common.table(list(rows[0]), [list(row.values()) for row in rows])
    print(json.dumps(result.get("losses", {}).get("rank correlations")))


if __name__ == "__main__":
    main()
