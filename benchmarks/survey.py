"""What does a budget cost before the first layer is quantised: seconds and memory, and how do they grow?

A survey reads the model layer by layer from its files. Measured, a process each: its peak of memory over that of a
process that only imported the same libraries, and its time, beside the time that GPTQModel takes to quantise the same
layers without an adapter; and the peak for models of few and of many layers of one width, which may differ by the
inputs of layers that are kept between the sweep forward and the one back. With `--parts experts`, what an expert adds:
random models of Qwen3-MoE's architecture, with few and with as many experts a layer as Qwen3-30B-A3B has.

    python benchmarks/survey.py --model qwen-coder --json
    python benchmarks/survey.py --model qwen-coder --parts memory --counts 4 16
    python benchmarks/survey.py --model qwen-coder --parts time --counts 3
    python benchmarks/survey.py --parts experts --json

Seconds are of the processor too (`cpu`), summed over threads, which tell more than the clock where others use the
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
from cost import high_water_mark
from gptqmodel import GPTQModel, QuantizeConfig

from gptqmodel_eora_ext.adapter.options import AdapterOptions
from gptqmodel_eora_ext.hosts.gptqmodel.survey import allocate_ranks
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.plan.survey import GRADIENT_TOKENS, KIND_TOKENS, MEMORY_VARIABLE, SENSITIVITY_TOKENS

BITS, GROUP_SIZE, SCALE_SEARCH = 2, 64, 2.4
BUDGET, FACTOR_BITS = "0.5bpw", 4
# What GPTQ is calibrated with by default, and more than a survey reads.
SAMPLES, SEQLEN = 128, 512
FEW, MANY = 4, 16
# Of the model, for the time beside quantising.
TIMED = 3
# The last is of models of its own.
PARTS = ("memory", "time", "experts")
ACTIONS = ("import", "survey", "quantize")
# Experts a layer: few, and Qwen3-30B-A3B's count. Of both, as there, each token is routed to 8.
EXPERTS = (32, 128)
EXPERT_SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
# In a process of its own, since transformers saves experts in another layout where GPTQModel is imported.
MAKE_EXPERTS = """
import json, sys, torch, transformers
torch.manual_seed(0)
config = transformers.Qwen3MoeConfig(**json.loads(sys.argv[1]))
transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[2])
"""


def first_layers(model: common.Subject, layers: int, folder: Path) -> common.Subject:
    """The model cut to its first layers without being loaded: its own files, and a config that asks for fewer."""
    folder.mkdir()
    for file in model.folder.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model.folder / "config.json").read_text())
    config["num_hidden_layers"] = layers
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    return replace(model, name=f"{model.name}, first {layers} layers", folder=folder)


def act(model: common.Subject, action: str, samples: int) -> dict[str, Any]:
    """Do one thing in this process, and tell what it took."""
    if action == "import":
        return {"peak bytes": high_water_mark()}
    config = QuantizeConfig(bits=BITS, group_size=GROUP_SIZE, mse=SCALE_SEARCH)
    calibration = common.calibration(model, samples, SEQLEN)
    with quiet():
        host = GPTQModel.load(str(model.folder), config)
        clock, processor = time.perf_counter(), time.process_time()
        if action == "survey":
            options = AdapterOptions.settle(
                rank=None, budget=BUDGET, preset=None, objective="eora", factor_bits=FACTOR_BITS,
                sensitivity="fisher", rounds=None,
            )  # fmt: skip
            prepared = host.prepare_dataset(calibration, batch_size=common.BATCH_SIZE)
            allocate_ranks(host, options, prepared, lambda name: None)
        else:
            host.quantize(calibration, batch_size=common.BATCH_SIZE)
    return {
        "seconds": time.perf_counter() - clock,
        "cpu": time.process_time() - processor,
        "peak bytes": high_water_mark(),
    }


def in_a_process(model: common.Subject, action: str, samples: int) -> dict[str, Any]:
    """`act` in a process of its own, with an empty cache."""
    with common.scratch() as cache:
        command = [sys.executable, __file__, "--one", action, "--model", str(model.folder), "--samples", str(samples)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True,
            env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(model: common.Subject, layers: list[int], samples: int) -> list[dict[str, Any]]:
    """One row a number of layers: the peak over that of imports alone, and what layer inputs are of it."""
    rows = []
    hidden = json.loads((model.folder / "config.json").read_text())["hidden_size"]
    for count in layers:
        with common.scratch() as folder:
            cut = first_layers(model, count, folder / "model")
            bare, found = (in_a_process(cut, action, samples) for action in ("import", "survey"))
        rows.append({
            "layers": count,
            "peak over imports, GB": (found["peak bytes"] - bare["peak bytes"]) / 1e9,
            "layer inputs, GB": 2 * count * GRADIENT_TOKENS * hidden / 1e9,
            "seconds": found["seconds"],
            "cpu": found["cpu"],
            "measured": common.measured(cut),
        })  # fmt: skip
    return rows


def beside_quantising(model: common.Subject, layers: int, samples: int) -> dict[str, Any]:
    """Times of a survey and of GPTQ without an adapter, on the same layers; both grow with their number."""
    with common.scratch() as folder:
        cut = first_layers(model, layers, folder / "model")
        taken = {action: in_a_process(cut, action, samples) for action in ACTIONS[1:]}
    return {
        "layers": layers,
        "samples": samples,
        **{f"{action}, {unit}": taken[action][unit] for action in taken for unit in ("seconds", "cpu")},
        "survey / quantize": taken["survey"]["seconds"] / taken["quantize"]["seconds"],
        "survey / quantize, cpu": taken["survey"]["cpu"] / taken["quantize"]["cpu"],
        "measured": common.measured(cut),
    }


def of_experts(model: common.Subject, counts: list[int], samples: int) -> list[dict[str, Any]]:
    """One row a number of experts a layer; the last also tells what each expert more took, of time and of the peak."""
    rows: list[dict[str, Any]] = []
    vocabulary = common.tokenizer(model)
    for count in counts:
        with common.scratch() as folder:
            sizes = {**EXPERT_SIZES, "num_experts": count, "vocab_size": len(vocabulary)}
            subprocess.run([sys.executable, "-c", MAKE_EXPERTS, json.dumps(sizes), str(folder / "model")], check=True)
            vocabulary.save_pretrained(folder / "model")
            made = replace(model, name="random Qwen3-MoE", folder=folder / "model", bits=None)
            bare, found = (in_a_process(made, action, samples) for action in ("import", "survey"))
        row: dict[str, Any] = {
            "experts a layer": count,
            "peak over imports, GB": (found["peak bytes"] - bare["peak bytes"]) / 1e9,
            "seconds": found["seconds"],
            "cpu": found["cpu"],
        }
        more = EXPERT_SIZES["num_hidden_layers"] * (count - rows[0]["experts a layer"]) if rows else 0
        peak = "peak over imports, GB"
        row |= {
            "ms an expert": 1e3 * (row["seconds"] - rows[0]["seconds"]) / more if more else None,
            "cpu ms an expert": 1e3 * (row["cpu"] - rows[0]["cpu"]) / more if more else None,
            "MB an expert": 1e3 * (row[peak] - rows[0][peak]) / more if more else None,
            "measured": common.measured(made),
        }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_model(parser, layers=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="by default all that the model serves for")
    parser.add_argument(
        "--counts", nargs="+", type=int, help=f"of layers: {FEW} and {MANY} for memory, {TIMED} for time"
    )
    parser.add_argument("--experts", nargs="+", type=int, default=EXPERTS, help="a layer, for the part of that name")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"calibration windows of {SEQLEN} tokens")
    parser.add_argument("--one", choices=ACTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with common.subject(options) as model:
        if options.one:
            print(json.dumps(act(model, options.one, options.samples)), file=sys.__stdout__)
            return
        setup = {
            "bits": BITS, "group_size": GROUP_SIZE, "mse": SCALE_SEARCH, "budget": BUDGET, "factor_bits": FACTOR_BITS,
            "seqlen": SEQLEN, "tokens": SENSITIVITY_TOKENS, "gradient tokens": GRADIENT_TOKENS,
            "kind tokens": KIND_TOKENS, "memory": os.environ.get(MEMORY_VARIABLE, "default"),
        }  # fmt: skip
        result = common.kept(model.results("survey"), setup)
        result["setup"] = setup
        parts = common.parts(options.parts, PARTS[2:], PARTS[:2], model)
        if "memory" in parts:
            result["memory"] = memory(model, options.counts or [FEW, MANY], options.samples)
            common.keep(model.results("survey"), result)
        if "time" in parts:
            result["time"] = [beside_quantising(model, count, options.samples) for count in options.counts or [TIMED]]
            common.keep(model.results("survey"), result)
        if "experts" in parts:
            result["experts"] = of_experts(model, options.experts, options.samples)
        common.keep(model.results("survey"), result, as_json=options.json)
        for rows in map(result.get, PARTS):
            if rows:
                header = [key for key in rows[0] if key != "measured"]
                common.table(header, [[row[key] for key in header] for row in rows])


if __name__ == "__main__":
    main()
