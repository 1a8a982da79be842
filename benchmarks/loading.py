"""Do all ways to load an adapter give the same logits, and what does a loaded model take?

logits   from one folder: GPTQModel with the plugin, GPTQModel without it (another process), and transformers + PEFT.
         Beside it, the same comparison of GPTQModel with PEFT for an adapter that GPTQModel's own `Lora` made. The
         largest difference is that of one logit in some 50 million, and varies with every bit of a checkpoint; the
         rms of all tells whether two ways differ by more than rounding.
memory   a process of its own loads a checkpoint at 2 bits and generates on the CPU (Linux). Beside the bytes of packed
         weights, adapter and embeddings on disk (`stored`) stand
           resident   memory that loading and generating added: anonymous pages of the process, and pages of the
                      checkpoint's files that are mapped. Pages of libraries' files do not count.
           any model  what a model of the same architecture and tokenizer adds that takes next to nothing (one layer of
                      128 features): modules that are imported on the way, the tokenizer, what torch keeps
           own        resident without that: what this model takes
           tensors    bytes of all tensors
         and seconds from the start of loading to the first token, and tokens per second after it. Weights
         are rounded to nearest and factors random (`rounded_checkpoint.py`): nothing here depends on their values.

    python benchmarks/loading.py --json
    python benchmarks/loading.py --model qwen-coder --parts memory
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import Lora
from peft import PeftModel
from rounded_checkpoint import rounded_checkpoint, tiny_model
from transformers import AutoModelForCausalLM

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.autoload import OFF_SWITCH
from gptqmodel_eora_ext.hosts.terminal import quiet

RANK = 32
WINDOWS, TOKENS = 4, 256
LARGEST, RMS = "largest difference over rms", "rms difference over rms"

MEMORY_BITS, MEMORY_GROUP, MEMORY_RANK, NEW_TOKENS, MEMORY_REPEATS = 2, 64, 32, 64, 3

MEMORY = """
import gc, json, sys, time
import torch
from gptqmodel import GPTQModel
torch.set_num_threads(2)

def resident():
    gc.collect()
    found, ours = 0, False
    with open("/proc/self/smaps") as lines:  # line by line: read at once it would take ten megabytes itself
        for line in lines:
            if "-" in line.split(" ", 1)[0]:
                ours = ".safetensors" in line  # the first line of a mapping ends with its file
            elif line.startswith("Rss:" if ours else "Anonymous:"):
                found += int(line.split()[1]) << 10
    return found

def generate(tokens):
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return time.perf_counter() - start

before, start = resident(), time.perf_counter()
model = GPTQModel.load(sys.argv[1], dtype=torch.bfloat16).model
prompt = torch.tensor([[50, 22, 28, 26, 65, 42]])
generate(1)
first = time.perf_counter() - start
one, many = generate(1), generate(int(sys.argv[2]))
added = resident() - before  # before a list of all objects takes some itself
storages = [one.untyped_storage() for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
tensors = {one.data_ptr(): one.nbytes() for one in storages}
found = {"resident_bytes": added, "tensor_bytes": sum(tensors.values()), "first_token_seconds": first,
         "tokens_per_second": (int(sys.argv[2]) - 1) / (many - one)}
print("FOUND", json.dumps(found))
"""

WITHOUT_PLUGIN = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
ids = torch.load(sys.argv[2], weights_only=True)
model = GPTQModel.load(sys.argv[1], backend=BACKEND.GPTQ_TORCH).model
with torch.inference_mode():
    torch.save(model(ids).logits, sys.argv[3])
"""


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=ids).logits
    return result.float()


def by_gptqmodel(checkpoint: Path, ids: torch.Tensor, adapter: Any = None) -> torch.Tensor:
    with quiet():
        model = GPTQModel.load(str(checkpoint), adapter=adapter, backend=BACKEND.GPTQ_TORCH)
    return logits(model.model, ids)


def by_peft(checkpoint: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter), ids)


def without_plugin(checkpoint: Path, ids: torch.Tensor, folder: Path) -> torch.Tensor:
    torch.save(ids, folder / "ids.pt")
    command = [sys.executable, "-c", WITHOUT_PLUGIN, str(checkpoint), str(folder / "ids.pt"), str(folder / "out.pt")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, OFF_SWITCH: "1"})
    result: torch.Tensor = torch.load(folder / "out.pt", weights_only=True)
    return result.float()


def memory(base: common.Subject, folder: Path) -> dict[str, float]:
    """What a model at 2 bits takes, and how fast it is; medians over processes."""
    layout = {"bits": MEMORY_BITS, "group_size": MEMORY_GROUP, "rank": MEMORY_RANK}
    rounded_checkpoint(base.folder, folder / "model", **layout)
    tiny_model(base.folder, folder / "tiny_full")
    rounded_checkpoint(folder / "tiny_full", folder / "tiny", **layout)
    # One process of each in turn, so that a machine that slows down slows both.
    runs = [(loaded(folder / "model"), loaded(folder / "tiny")) for _ in range(MEMORY_REPEATS)]
    found = {name: statistics.median(whole[name] for whole, _ in runs) for name in runs[0][0]}
    found["any_model_bytes"] = statistics.median(tiny["resident_bytes"] for _, tiny in runs)
    found["own_bytes"] = found["resident_bytes"] - found["any_model_bytes"]
    # The files hold the packed weights and the embeddings, and the adapter; their headers are some kilobytes.
    stored = sum(path.stat().st_size for path in (folder / "model").rglob("*.safetensors"))
    over = {f"{name}_over_stored": found[f"{name}_bytes"] / stored for name in ("resident", "own", "tensor")}
    return {**found, "stored_bytes": stored, **over}


def loaded(checkpoint: Path) -> dict[str, float]:
    """What a process says that loads a checkpoint and generates."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(checkpoint), str(NEW_TOKENS)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"loading `{checkpoint}` failed:\n{done.stderr[-2000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    found: dict[str, float] = json.loads(line.removeprefix("FOUND"))
    return found


def compared(base: common.Subject, folder: Path, bits: int) -> dict[str, dict[str, float]]:
    """The largest and the rms difference of logits, over their rms, for each pair of ways to load."""
    ids = common.held_out(base)["wikitext2"][: WINDOWS * TOKENS].view(WINDOWS, TOKENS)
    for name, adapter in (("ours", EoRA(rank=RANK)), ("stock", Lora(rank=RANK, path=str(folder / "lora")))):
        with quiet():
            model = GPTQModel.load(str(base.folder), QuantizeConfig(bits=bits, group_size=64))
            model.quantize(common.calibration(base, 8, 256), batch_size=common.BATCH_SIZE, adapter=adapter)
            model.save(str(folder / name))
        del model
    ours = by_gptqmodel(folder / "ours", ids)
    stock = by_gptqmodel(folder / "stock", ids, Lora(rank=RANK, path=str(folder / "lora")))
    pairs = {
        "ours: with the plugin against without": (ours, without_plugin(folder / "ours", ids, folder)),
        "ours: GPTQModel against PEFT": (ours, by_peft(folder / "ours", folder / "ours" / "eora", ids)),
        "stock Lora: GPTQModel against PEFT": (stock, by_peft(folder / "stock", folder / "lora", ids)),
    }
    found: dict[str, dict[str, float]] = {LARGEST: {}, RMS: {}}
    for name, (one, other) in pairs.items():
        rms, difference = one.square().mean().sqrt(), one - other
        found[LARGEST][name] = float(difference.abs().max() / rms)
        found[RMS][name] = float(difference.square().mean().sqrt() / rms)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--bits", type=int, default=4, help="a model that still computes sense; noise grows below 4")
    parser.add_argument("--parts", nargs="+", choices=("logits", "memory"), default=["logits", "memory"])
    common.add_model(parser)
    options = parser.parse_args()
    with common.subject(options) as base, common.scratch() as folder:
        path = base.results("loading")
        result = common.kept(path)
        if "memory" in options.parts:
            found = memory(base, folder)
            result["memory"] = {"measured": common.measured(base), **found}
            common.table(("memory", "found"), list(found.items()))
        if "logits" in options.parts:
            differences = compared(base, folder, options.bits)
            setup = {"bits": options.bits, "layers": options.layers or "all", "rank": RANK, "windows": WINDOWS,
                     "tokens": TOKENS}  # fmt: skip
            result |= {"measured": common.measured(base), "setup": setup, **differences}
            rows = [[pair, largest, differences[RMS][pair]] for pair, largest in differences[LARGEST].items()]
            common.table(("comparison", "largest difference", "rms difference (over the logits' rms)"), rows)
        common.keep(path, result, as_json=options.json)


if __name__ == "__main__":
    main()
