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
from gptqmodel_eora_ext.hosts.gptqmodel.modules import module_shapes
from gptqmodel_eora_ext.hosts.gptqmodel.survey import survey
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.plan import forecast_modules
from gptqmodel_eora_ext.plan.divergence import Divergence
from gptqmodel_eora_ext.plan.forecast import Rounder
from gptqmodel_eora_ext.plan.forecast import forecast as forecast_module
from gptqmodel_eora_ext.plan.survey import KIND_TOKENS, first_tokens, unseen_tokens
from gptqmodel_eora_ext.solve import Grid, eora, weighted_energy

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
    with quiet():
        host = GPTQModel.load(str(model.folder), QuantizeConfig(bits=bits[0], group_size=GRID.group_size))
        shapes = module_shapes(host)
        linears, sensitivity = survey(host, shapes, common.calibration(model, SAMPLES, SEQLEN), kind="relative")
    errors: dict[str, dict[str, dict[int, float]]] = {}
    for method, spread in (("GPTQ", True), ("nearest", False)):
        rounded = Rounder(sensitivity, GRID, spread=spread)
        for name, linear in linears.items():
            weight, moment = linear.weight.data.float(), sensitivity.second_moments[name].to(linear.weight.device)
            signal = weighted_energy(weight, moment)
            errors.setdefault(method, {})[name] = {
                width: weighted_energy(weight - one, moment) / signal
                for width, one in zip(bits, rounded(name, weight, bits), strict=True)
            }
    return errors


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
        linears, sensitivity = survey(host, shapes, common.calibration(model, SAMPLES, SEQLEN), kind="fisher")
    weights = {name: linear.weight.data for name, linear in linears.items()}
    known = {"predicted": sensitivity, "independent": replace(sensitivity, weighted_moments={})}
    rows = [{"bits": run["bits"], "rank": run["rank"], "factor_bits": run.get("factor_bits", 16)} for run in cells]
    for bits, mse in recovery["setup"]["mse"].items():
        grid, width = Grid(recovery["setup"]["group_size"], True, mse), int(bits)
        for name, one in known.items():
            modules = forecast_modules(shapes, weights, one, grid, most=most, swept=width, bits=(width,))
            for row in rows:
                if row["bits"] == width:
                    row[name] = sum(module.loss(width, row["rank"], row["factor_bits"]) for module in modules)
    texts = common.common_texts(recovery["full"], *(run["loss"] for run in cells))
    for row, run in zip(rows, cells, strict=True):
        row |= {text: run["loss"][text] - recovery["full"][text] for text in texts}
    correlations = {
        name: {text: common.rank_correlation([row[name] for row in rows], [row[text] for row in rows])
               for text in texts}
        for name in known
    }  # fmt: skip
    return {"rank correlations": correlations, "cells": rows}


def losses_by_kind(model: common.Subject) -> list[dict[str, Any]]:
    """One row a kind of module (`q_proj`): loss above full precision.

    Predicted, as a divergence on calibration tokens that predictions stand on and on others, and on held-out text.
    """
    calibration = common.calibration(model, SAMPLES, SEQLEN)
    with quiet():
        host = GPTQModel.load(str(model.folder), QuantizeConfig(bits=KIND_BITS, group_size=GRID.group_size))
        shapes = module_shapes(host)
        linears, sensitivity = survey(host, shapes, calibration, kind="fisher")
    independent = replace(sensitivity, weighted_moments={})
    rounded = Rounder(sensitivity, GRID)
    dense, texts = common.base_model(model), common.held_out(model)
    full = common.losses(dense, texts, KIND_WINDOWS)
    known_linears = {name: dense.get_submodule(name) for name in linears}
    divergences = {
        "on tokens seen": Divergence(dense, known_linears, first_tokens(calibration, KIND_TOKENS)),
        "on others": Divergence(dense, known_linears, unseen_tokens(calibration)),
    }
    compensated: dict[str, dict[str, torch.Tensor]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, linear in linears.items():
        weight = linear.weight.data.float()
        [quantized] = rounded(name, weight, [KIND_BITS])
        delta = weight - quantized
        lora_A, lora_B = eora(delta, sensitivity.second_moments[name], KIND_RANK)
        kind = name.rsplit(".", 1)[-1]
        compensated.setdefault(kind, {})[name] = (quantized + lora_B @ lora_A).to(torch.bfloat16)
        row = rows.setdefault(kind, {"kind": kind, "independent": 0.0, "corrected": 0.0})
        for column, known in (("independent", independent), ("corrected", sensitivity)):
            predicted = forecast_module(name, delta, known, KIND_RANK)
            row[column] += predicted.total - float(predicted.gains.sum())
    for kind, weights in compensated.items():
        rows[kind] |= {column: divergence(weights) for column, divergence in divergences.items()}
        kept = {name: dense.get_submodule(name).weight.data for name in weights}
        for name, weight in weights.items():
            dense.get_submodule(name).weight.data = weight
        measured = common.losses(dense, texts, KIND_WINDOWS)
        for name, weight in kept.items():
            dense.get_submodule(name).weight.data = weight
        rows[kind] |= {text: measured[text] - full[text] for text in full}
        mean = sum(rows[kind][text] for text in full) / len(full)
        for column in ("independent", "corrected", "on others"):
            rows[kind][f"measured / {column}"] = mean / rows[kind][column]
    return list(rows.values())


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
