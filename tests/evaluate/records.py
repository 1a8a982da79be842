"""A record as `eora eval` writes it, made up: three models, a text, a task, prompts, an adapter's figures."""

from __future__ import annotations

from typing import Any

import numpy

from gptqmodel_eora_ext.evaluate.record import FORMAT

FULL, PLAIN, MIX = "SmolLM2-135M", "plain GPTQ, 3 bits", "planned <mix> + EoRA"
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
LAYERS, WINDOWS, ITEMS = 6, 16, 50


def record(layers: int = LAYERS) -> dict[str, Any]:
    draws = numpy.random.default_rng(0)
    hardness = draws.normal(3.1 * 511, 40, WINDOWS)

    def text(name: str, above: float) -> dict[str, Any]:
        nats = (hardness + 511 * above + draws.normal(0, 5, WINDOWS)).round(3).tolist()
        found: dict[str, Any] = {"model": name, "nats": nats, "tokens": [511] * WINDOWS}
        if above:
            found |= {"same": [int(511 * (1 - above / 3))] * WINDOWS, "kl": [511 * above] * 4 + [None] * 12}
        return found

    def task(name: str, share: float) -> dict[str, Any]:
        values = (draws.random(ITEMS) < share).astype(float).tolist()
        items = [{"id": number, "value": value, "given": "2"} for number, value in enumerate(values)]
        return {"model": name, "metric": "acc_norm", "value": sum(values) / ITEMS, "metrics": {}, "items": items}

    modules = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in KINDS]
    ranks = {module: 4 + 3 * number % 40 for number, module in enumerate(modules)}
    adapter = {
        "factor_bits": 4, "ranks": ranks, "error_left": 0.41, "objective": "eora", "method": "gptq", "rank": 43,
        "errors": {module: [0.2 + 0.001 * number, 0.08] for number, module in enumerate(modules)},
        "spectra": {module: [2.0 / (1 + place) for place in range(rank)] for module, rank in ranks.items()},
        "calibration": {"tokens": 8192, "sha256": "ab" * 32}, "versions": {"gptqmodel": "7.7.0"}, "seconds": 12.0,
        "allocation": None,
    }  # fmt: skip
    table = {
        "rest": 57_000_000, "plain": {"2": 84_000_000, "3": 101_000_000, "4": 114_000_000},
        "adapters": [{"rank": 32, "factor_bits": 16, "bytes": 19_500_000, "total": 120_000_000}],
    }  # fmt: skip
    quantised = {"modules": len(modules), "weights": 106_000_000, "group_size": 64, "widths": {"3": len(modules)},
                 "bits_per_weight": 3.3, "table": table}  # fmt: skip
    models = [
        {"name": FULL, "kind": "full precision", "path": "/m/full", "adapter_path": None, "bytes": 269_000_000,
         "adapter_bytes": 0},
        {"name": PLAIN, "kind": "quantised", "path": "/m/plain", "adapter_path": None, "bytes": 101_000_000,
         "adapter_bytes": 0, "quantised": quantised},
        {"name": MIX, "kind": "quantised with adapter", "path": "/m/mix", "adapter_path": "/m/mix/eora",
         "bytes": 96_000_000, "adapter_bytes": 4_400_000, "adapter": adapter,
         "quantised": {**quantised, "widths": {"2": 4, "3": len(modules) - 4}, "bits_per_weight": 3.25}},
    ]  # fmt: skip
    return {
        "format": FORMAT,
        "title": "A planned mix beside plain 3 bits",
        "settings": {"window": 512, "stride": 512, "max_windows": 16, "limit": None, "written_tokens": 40},
        "made": "2026-11-27T05:00:00+00:00",
        "versions": {"torch": "2.14.1"},
        "machine": {"processor": "a processor", "cores": 2, "device": "cpu"},
        "models": models,
        "texts": [{"name": "heldout", "file": "heldout.txt", "sha256": "cd" * 32,
                   "windows": "non-overlapping windows of 512 tokens",
                   "results": [text(FULL, 0.0), text(PLAIN, 0.9), text(MIX, 0.5)]}],
        "tasks": [{"name": "gsm8k", "task": "gsm8k", "file": None, "sha256": None, "metric": "acc_norm",
                   "results": [task(FULL, 0.6), task(PLAIN, 0.3), task(MIX, 0.5)]}],
        "speed": [{"model": name, "tokens_per_second": speed, "runs": [speed], "peak_bytes": 900_000_000}
                  for name, speed in ((FULL, 22.0), (PLAIN, 34.0), (MIX, 31.0))],
        "samples": [{"prompt": "The capital of France is",
                     "results": [{"model": name, "text": " Paris, <b>the</b> city of light" + " and more" * 12}
                                 for name in (FULL, PLAIN, MIX)]}],
        "stages": [{"name": f"{name}: text heldout", "seconds": 12.5} for name in (FULL, PLAIN, MIX)],
    }  # fmt: skip
