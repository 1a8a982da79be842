"""Adapters for checkpoints that other tools made: are they at the optimum, and does PEFT compute what they say?

A model is compressed in each format, and `eora generate`'s maker makes an adapter of one rank for it. Then, apart from
that: the weighted error tr(Δ C Δᵀ) of every module before and after, and what the best factors of that rank leave, by a
decomposition in float64, C being measured on the inputs that the compensated model gives its modules; and the logits of
transformers + PEFT against those of the base with Ŵ for its weights and (x Aᵀ) Bᵀ added. Formats whose libraries are
not there are left out and named; `make test-formats` installs them.

    PYTHONPATH=.venv/formats python benchmarks/foreign.py --layers 2 --json
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

import common
import torch
from safetensors.torch import load_file

from gptqmodel_eora_ext.hosts.jobs import AdapterJob
from gptqmodel_eora_ext.hosts.registry import adapter_maker
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.hosts.transformers.dense import dense_weight
from gptqmodel_eora_ext.hosts.transformers.reader import LayerReader
from gptqmodel_eora_ext.solve import eora, weighted_energy

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.hosts.foreign_models import FORMATS, Format, computed_apart, logits

RANK = 32
# Four times the tokens of the widest input of SmolLM2, so that C is of full rank.
SAMPLES, SEQLEN = 24, 256


def errors(base: Any, model: Any, checkpoint: Path, adapter: Path, windows: list[Any]) -> list[dict[str, float]]:
    """Of each module: weighted error before, after, and at the optimum."""
    stored = load_file(adapter / "adapter_model.safetensors")
    names = [name for name, _ in model.named_modules() if f"base_model.model.{name}.lora_A.weight" in stored]
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + rows.T @ rows

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    for window in windows:
        logits(model, torch.tensor([window["input_ids"]]))
    for handle in handles:
        handle.remove()
    reader = LayerReader(checkpoint)
    found = []
    for name in names:
        delta = base.get_submodule(name).weight.double() - dense_weight(reader.module(name), name, torch.bfloat16)
        lora_A, lora_B = (stored[f"base_model.model.{name}.lora_{half}.weight"].double() for half in "AB")
        best_A, best_B = eora(delta, sums[name], RANK, exact=True)
        found.append({
            key: float(weighted_energy(rest, sums[name])) for key, rest in
            (("before", delta), ("after", delta - lora_B @ lora_A), ("optimum", delta - best_B @ best_A))
        })  # fmt: skip
    return found


def measure(base: common.Subject, form: Format) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    windows = common.calibration(base, SAMPLES, SEQLEN)
    ids = torch.tensor([windows[0]["input_ids"]])
    with common.scratch() as scratch, quiet(), torch.no_grad():
        checkpoint = form.make(base.folder, scratch / "checkpoint")
        job = AdapterJob(str(base.folder), checkpoint, windows, {"rank": RANK}, scratch / "adapter",
                         batch_size=common.BATCH_SIZE)  # fmt: skip
        adapter = adapter_maker(checkpoint)(job)
        apart = computed_apart(base.folder, checkpoint, adapter)
        found = errors(common.base_model(base), apart, checkpoint, adapter, windows)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", **form.loading())
        adapted, expected = (logits(one, ids) for one in (PeftModel.from_pretrained(model, adapter).eval(), apart))
    total = {key: sum(one[key] for one in found) for key in found[0]}
    return {
        "modules": len(found),
        "error left": total["after"] / total["before"],
        "after / optimum, median": statistics.median(one["after"] / one["optimum"] for one in found),
        "after / optimum, largest": max(one["after"] / one["optimum"] for one in found),
        "logits apart": float((adapted - expected).norm() / expected.norm()),
        "activations": form.activations,
        "measured": common.measured(base),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--fresh", action="store_true", help="measure again what the results file already holds")
    common.add_model(parser)
    options = parser.parse_args()
    with common.subject(options) as base:
        setup = {"rank": RANK, "samples": SAMPLES, "seqlen": SEQLEN, "layers": options.layers or "all"}
        path = base.results("foreign")
        rows = {} if options.fresh else common.kept(path, setup).get("rows", {})
        for name in options.formats:
            form = FORMATS[name]
            if form.needs and importlib.util.find_spec(form.needs) is None:
                print(f"{name}: {form.needs} is not installed", file=sys.stderr)
            elif name not in rows:
                rows[name] = measure(base, form)
                common.keep(path, {"setup": setup, "rows": rows})
    common.keep(path, {"setup": setup, "rows": rows}, as_json=options.json)
    header = ("format", "modules", "error left", "after / optimum, median", "after / optimum, largest", "logits apart")
    common.table(header, [[name, *(row[key] for key in header[1:])] for name, row in rows.items()])


if __name__ == "__main__":
    main()
