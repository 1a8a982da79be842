"""Does vLLM serve what the plugin writes as exactly as torch computes it, and faster than without the plugin?

    make vllm
    python benchmarks/serving_vllm.py                      # SmolLM2, all parts
    python benchmarks/serving_vllm.py --parts exact        # or exact, speed, batch, memory
    python benchmarks/serving_vllm.py --layers 2 --repeats 1 --tokens 8    # does it run

Servers are processes of their own that are asked in turn, so that all see the same machine: each figure of speed is the
median over the rounds, and each ratio the median of the ratios within a round. Checkpoints are made once, below the
cache folder. What was asked of the figures:

    exact    largest_error at most 2e-3 nats, all tokens the same, mean_error_bfloat16 at most 0.02 nats
    speed    with the adapter at least 0.95 × without; 2 × vLLM's LoRA path at 4 bits; 1.3 × vLLM in bfloat16
    batch    at least 0.9 × vLLM's 4-bit kernel without an adapter
    memory   packed weights once: a ratio of 1 over the bytes on disk
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import torch
from vllm_reference import dense_model, greedy, losses
from vllm_tools import MISSING, Server, is_installed, vllm_version

from gptqmodel_eora_ext.system.files import cache_folder, write_json

RANK = 32
# Enough for a model that makes sense. One that does not turns the last bit of a float32 sum into thousandths of a nat:
# after 4k tokens without a search for scales, torch's own losses in float32 were 3e-3 off those in float64.
CALIBRATION = (64, 256)
TWO_BITS = {"bits": 2, "group_size": 64, "mse": 2.4}
PROMPT, EXACT_PROMPTS, EXACT_TOKENS = 256, 4, 64
BATCH = 16
# Of the key-value cache: few and the same for all, so that it does not count in what weights take.
BLOCKS = {"num_gpu_blocks_override": 128}
# Tokens of it where memory is what counts, and of a block, in which vLLM reserves them.
CACHED, CACHED_BLOCK = 256, 32
# Compiled, as vLLM is by default.
SPEED = {"dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": BATCH, "enable_prefix_caching": False,
         "enforce_eager": False}  # fmt: skip
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

MIXED = {r"+:.*v_proj": {"bits": 4}, r"+:.*down_proj": {"bits": 3}, r"+:.*layers\.0\..*": {"bits": 4}}
# Name → QuantizeConfig, EoRA.
CHECKPOINTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "2-sym-plain": (TWO_BITS, {"rank": RANK}),
    "2-asym-packed4": ({**TWO_BITS, "sym": False}, {"rank": RANK, "factor_bits": 4}),
    "3-sym-packed8": ({"bits": 3, "group_size": 64}, {"rank": RANK, "factor_bits": 8}),
    "3-asym-plain": ({"bits": 3, "group_size": 64, "sym": False}, {"rank": RANK}),
    "4-sym-plain": ({"bits": 4, "group_size": 64}, {"rank": RANK}),
    "4-asym-packed4": ({"bits": 4, "group_size": 64, "sym": False}, {"rank": RANK, "factor_bits": 4}),
    "mixed-packed4": ({**TWO_BITS, "dynamic": MIXED}, {"budget": "0.5bpw", "factor_bits": 4}),
}


class Bench:
    """What the parts share.

    Args:
        base: the model.
        home: where its checkpoints are kept.
        options: of the command line.
    """

    def __init__(self, base: common.Subject, home: Path, options: argparse.Namespace) -> None:
        self.base, self.options, self._home = base, options, home
        self._ids: list[int] = common.held_out(base)["wikitext2"].flatten().tolist()

    def checkpoint(self, name: str) -> Path:
        """A checkpoint of `CHECKPOINTS`, made now if it is not there."""
        folder = self._home / name
        if not folder.exists():
            from gptqmodel import GPTQModel, QuantizeConfig

            from gptqmodel_eora_ext import EoRA

            config, adapter = CHECKPOINTS[name]
            host = GPTQModel.load(str(self.base.folder), QuantizeConfig(**config))
            host.quantize(common.calibration(self.base, *CALIBRATION), batch_size=common.BATCH_SIZE,
                          adapter=EoRA(**adapter))  # fmt: skip
            host.save(str(folder))
        return folder

    def without_adapter(self, checkpoint: Path) -> Path:
        """The same weights in a checkpoint that names no adapter."""
        folder = checkpoint.with_name(f"{checkpoint.name}-bare")
        if not folder.exists():
            common.without_adapter(checkpoint, folder)
        return folder

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Pieces of the text, each another."""
        return [self._ids[at * length : (at + 1) * length] for at in range(count)]


def asked(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer that is no error."""
    if "error" in answer:
        raise SystemExit(answer["error"])
    return answer


def exact(bench: Bench) -> dict[str, Any]:
    """Losses token by token and greedy tokens, against torch in float32 with Ŵ + B A."""
    found = {}
    prompts = bench.prompts(EXACT_PROMPTS, PROMPT)
    tokens = bench.options.tokens or EXACT_TOKENS
    with Server() as server:
        for name in CHECKPOINTS:
            folder = bench.checkpoint(name)
            model = dense_model(folder, "own")
            expected = [losses(model, ids) for ids in prompts]
            options = {"max_model_len": 512, **BLOCKS}
            single = asked(server.ask(folder, prompts, losses=True, tokens=tokens, options=options))
            half = asked(server.ask(folder, prompts, losses=True, options={**options, "dtype": "bfloat16"}))
            pairs = [(one, other) for wanted, got in zip(expected, single["losses"], strict=True)
                     for one, other in zip(wanted, got, strict=True)]  # fmt: skip
            means = [statistics.fmean(itertools.chain(*some)) for some in (expected, single["losses"], half["losses"])]
            found[name] = {
                "mean": means[0],
                "largest_error": max(abs(one - other) for one, other in pairs),
                "mean_error_bfloat16": abs(means[2] - means[0]),
                "tokens_same": sum(one == other for ids, got in zip(prompts, single["generated"], strict=True)
                                   for one, other in zip(greedy(model, ids, tokens), got, strict=True)),
                "tokens": tokens * len(prompts),
            }  # fmt: skip
            print(name, found[name], flush=True)
    return found


@contextlib.contextmanager
def side_by_side(count: int, *, stock: tuple[int, ...]) -> Iterator[list[Server]]:
    """Servers, some of them without the plugin."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Server(stock=place in stock)) for place in range(count)]


def rates(servers: list[Server], questions: list[dict[str, Any]], rounds: int, counted: int) -> list[list[float]]:
    """Tokens per second of each server in each round, after one round that does not count."""
    found: list[list[float]] = [[] for _ in servers]
    for number in range(rounds + 1):
        for place, (server, question) in enumerate(zip(servers, questions, strict=True)):
            answer = asked(server.ask(**question))
            if number:
                found[place].append(counted / answer["seconds"])
    return found


def summary(names: list[str], found: list[list[float]], over: list[tuple[str, int, int]]) -> dict[str, Any]:
    result: dict[str, Any] = {name: statistics.median(some) for name, some in zip(names, found, strict=True)}
    for name, one, other in over:
        result[name] = statistics.median(a / b for a, b in zip(found[one], found[other], strict=True))
    print(result, flush=True)
    return result


def speed(bench: Bench) -> dict[str, Any]:
    """Generation at batch 1, bfloat16. Presets make factors of 4 bits; those of 16 bits read four times as much."""
    tokens, rounds = bench.options.tokens or 64, bench.options.repeats
    two, wide, four = (bench.checkpoint(name) for name in ("2-asym-packed4", "2-sym-plain", "4-sym-plain"))
    prompt = bench.prompts(1, 16)
    plain = {"prompts": prompt, "tokens": tokens, "options": {**SPEED, **BLOCKS}}
    lora = {**SPEED, **BLOCKS, "enable_lora": True, "max_lora_rank": RANK, "max_loras": 1,
            "lora_target_modules": LINEARS}  # fmt: skip
    names = ["2 bits, 4-bit adapter", "2 bits", "2 bits, 16-bit adapter", "4 bits, 16-bit adapter",
             "4 bits, vLLM's LoRA path", "bfloat16, vLLM"]  # fmt: skip
    # Of these, those that are served without the plugin.
    without_plugin = (4, 5)
    questions = [
        {"model": two, **plain},
        {"model": bench.without_adapter(two), **plain},
        {"model": wide, **plain},
        {"model": four, **plain},
        {"model": bench.without_adapter(four), **plain, "options": lora, "loras": [str(four / "eora")]},
        {"model": bench.base.folder, **plain},
    ]
    # A server that was started after another serves a few hundredths faster: both orders count alike.
    found: list[list[float]] = [[] for _ in names]
    for order in (list(range(len(names))), list(reversed(range(len(names))))):
        stock = tuple(place for place, number in enumerate(order) if number in without_plugin)
        with side_by_side(len(names), stock=stock) as servers:
            measured = rates(servers, [questions[number] for number in order], rounds, tokens)
        for number, some in zip(order, measured, strict=True):
            found[number] += some
    over = [("with the adapter / without", 0, 1), ("with the 16-bit adapter / without", 2, 1),
            ("over vLLM's LoRA path, 4 bits", 3, 4), ("over vLLM in bfloat16", 0, 5)]  # fmt: skip
    return summary(names, found, over)


def batch(bench: Bench) -> dict[str, Any]:
    """16 requests with prompts of 256 tokens at once, bfloat16: prompt and generated tokens per second."""
    tokens, rounds = bench.options.tokens or 32, bench.options.repeats
    four = bench.checkpoint("4-sym-plain")
    names = ["2 bits, 4-bit adapter", "4 bits, 16-bit adapter", "4 bits, vLLM's kernel, no adapter"]
    plain = {"prompts": bench.prompts(BATCH, PROMPT), "tokens": tokens,
             "options": {**SPEED, "num_gpu_blocks_override": 1024}}  # fmt: skip
    models = [bench.checkpoint("2-asym-packed4"), four, bench.without_adapter(four)]
    with side_by_side(len(names), stock=(2,)) as servers:
        found = rates(servers, [{"model": model, **plain} for model in models], rounds, BATCH * (PROMPT + tokens))
    return summary(names, found, [("16 × 256, over vLLM's 4-bit kernel without an adapter", 1, 2)])


def memory(bench: Bench) -> dict[str, Any]:
    """What loading adds to the server's process, over the bytes of the checkpoint's files.

    A second checkpoint that holds the first of the layers alone is served as well: the difference of both is what
    layers take, without what vLLM itself needs. Their keys and values are not counted.
    """
    folder = bench.checkpoint("2-sym-plain")
    first = first_layer(folder)
    # One more than are asked for, which vLLM leaves empty.
    blocks = CACHED // CACHED_BLOCK + 1
    # Not compiled: the compiler would stay in memory.
    options = {**SPEED, "enforce_eager": True, "max_model_len": CACHED, "block_size": CACHED_BLOCK,
               "num_gpu_blocks_override": blocks}  # fmt: skip
    found = {}
    for name, one in (("whole", folder), ("first layer", first)):
        with Server() as server:
            answer = asked(server.ask(one, bench.prompts(1, 16), tokens=8, options=options))
            found[name] = {"added": answer["bytes"], "on_disk": disk_bytes(one)}
    added, on_disk = (found["whole"][key] - found["first layer"][key] for key in ("added", "on_disk"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = config["num_hidden_layers"] - 1
    width = config["num_key_value_heads"] * config["head_dim"]
    cached = layers * blocks * CACHED_BLOCK * 2 * width * torch.bfloat16.itemsize
    found["layers"] = {"added": added, "keys and values": cached, "on_disk": on_disk,
                       "ratio": (added - cached) / on_disk if on_disk else None}  # fmt: skip
    print(found, flush=True)
    return found


def disk_bytes(folder: Path) -> int:
    """Of a checkpoint's tensors and its adapter's."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def first_layer(checkpoint: Path) -> Path:
    """A copy of a checkpoint with its first layer alone."""
    from safetensors.torch import load_file, save_file

    folder = checkpoint.with_name(f"{checkpoint.name}-first")
    if not folder.exists():
        shutil.copytree(checkpoint, folder)
        for path in folder.rglob("*.safetensors"):
            tensors = load_file(path)
            kept = {name: one for name, one in tensors.items() if ".layers." not in name or ".layers.0." in name}
            save_file(kept, path, metadata={"format": "pt"})
        path = folder / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**content, "num_hidden_layers": 1, "layer_types": None})
    return folder


PARTS = {"exact": exact, "speed": speed, "batch": batch, "memory": memory}


def main() -> None:
    """Run the parts and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds of what is timed")
    parser.add_argument("--tokens", type=int, default=0, help="to generate; left out, what each part has")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not is_installed():
        raise SystemExit(MISSING)
    with common.subject(options) as base, common.scratch() as scratch:
        # The first layers alone are another model each time; checkpoints of a whole one serve the next run as well.
        home = scratch if options.layers else cache_folder() / "serving" / base.folder.name
        bench, path = Bench(base, home, options), base.results("serving_vllm")
        result = common.kept(path)
        for name in options.parts:
            result[name] = {**PARTS[name](bench), "measured": {**common.measured(base), "vllm": vllm_version()}}
            common.keep(path, result)
        common.keep(path, result, as_json=options.json)


if __name__ == "__main__":
    main()
