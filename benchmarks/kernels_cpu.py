"""How fast are the fused CPU kernels, beside GPTQModel's own and beside a dense model?

one_row    one row, 2 and 3 bits, with adapter: stock `TorchLinear` + `Lora.apply`, plain and compiled (as it is by
           default, for seconds a shape), and dense bfloat16 `F.linear`
bandwidth  one row, 2 bits: bytes read over the bandwidth measured beside it, without the adapter and with it
shared     one row, 2 bits, with adapter: modules that read the same input together and one after the other
adapter    one row and 256, 2 bits: SmolLM2's linear layers one after the other, with adapters of 4, 8 and 16 bits and
           without
four_bits  one row, 4 bits, with adapter: GPTQModel's `TorchAtenLinear` and `TorchCpuAvx512Linear` + `Lora.apply`
prefill    512 rows, with adapter: dense bfloat16 `F.linear`
model      the whole model at 2 bits with rank 32, tokens per second of `model.generate`

One process, two threads, bfloat16, medians of interleaved runs, each after one that is not counted: the same for every
contender of a part. Weights and factors are cycled through copies that together do not fit the last-level cache, but
in `prefill` and for stock in `one_row`, which are bound by arithmetic: one copy is at most to their advantage. Of
another model than SmolLM2 only `model` can be measured.

    python benchmarks/kernels_cpu.py --json
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import Lora
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_aten_kernel import TorchAtenLinear
from gptqmodel.nn_modules.qlinear.torch_cpu_avx512 import TorchCpuAvx512Linear
from torch.nn.functional import linear

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.formats.factors import Factors, QuantizedFactor
from gptqmodel_eora_ext.formats.packed_weights import PackedWeight, words
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.kernels.cpu.repack import repack_weight
from gptqmodel_eora_ext.kernels.fused import FusedLinear, JointLinears
from gptqmodel_eora_ext.solve.quantized import quantize_factor

THREADS = 2
RANK = 64
# out × in.
SHAPES = ((4096, 4096), (12288, 4096), (4096, 12288))
GROUP_SIZES = (64, 128)
# Bytes of all copies of a weight: four times this machine's last-level cache.
CYCLED_BYTES = 128 << 20
REPEATS = 25
# What the adapter adds is a tenth of a layer's 0.2 to 0.6 ms.
BANDWIDTH_REPEATS = 100
# Inputs, and outputs of the modules that read them.
SHARED = {
    "SmolLM2 q, k, v": (576, (576, 192, 192)),
    "SmolLM2 gate, up": (576, (1536, 1536)),
    "Qwen3-8B q, k, v": (4096, (4096, 1024, 1024)),
    "Qwen3-8B gate, up": (4096, (12288, 12288)),
}
# A layer of SmolLM2: inputs, and outputs of the modules that read them.
LAYER = ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)))
LAYERS, ADAPTER_RANKS = 30, (32, 64)
# Rows, and rounds.
ADAPTER_ROWS = {1: 60, 256: 12}
# Values in bfloat16 that are read between two tokens, as `lm_head` is, so that nothing of the layers stays in cache.
HEAD = 49152 * 576
PREFILL_ROWS, PREFILL_REPEATS = 512, 5
MODEL_RANK, MODEL_SAMPLES, MODEL_SEQLEN, NEW_TOKENS, MODEL_REPEATS = 32, 16, 128, 64, 3

Run = Callable[[], Any]


def weight(bits: int, out_features: int, in_features: int, group_size: int) -> PackedWeight:
    """Random codes, symmetric."""
    groups = in_features // group_size
    bounds = torch.iinfo(torch.int32)
    zeros = sum((1 << (bits - 1)) << shift for shift in range(0, 32, bits)) if bits != 3 else 0
    return PackedWeight(
        qweight=torch.randint(bounds.min, bounds.max, (words(in_features, bits), out_features), dtype=torch.int32),
        qzeros=torch.tensor(zeros).to(torch.int32).expand(groups, words(out_features, bits)).contiguous(),
        scales=(torch.rand(groups, out_features) * 0.01).to(torch.float16),
        g_idx=torch.arange(in_features, dtype=torch.int32) // group_size,
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        out_features=out_features,
    )


def factors(packed: PackedWeight) -> Factors:
    down, up = (torch.randn(RANK, width) * 0.02 for width in (packed.in_features, packed.out_features))
    return Factors(down.to(torch.float16), up.to(torch.float16))


def stock(kernel: type[TorchLinear], packed: PackedWeight, lora: Factors) -> Any:
    """One of GPTQModel's kernels with the same weight and a stock adapter, bfloat16."""
    module = kernel(bits=packed.bits, group_size=packed.group_size, sym=True, desc_act=False, bias=False,
                    in_features=packed.in_features, out_features=packed.out_features)  # fmt: skip
    module.load_state_dict({name: getattr(packed, name) for name in ("qweight", "qzeros", "scales", "g_idx")})
    module = module.to(torch.bfloat16).eval()
    module.post_init()
    down, up = lora.dense(torch.bfloat16)
    module.adapter = Lora(rank=RANK, lora_A=down.T, lora_B=up)
    return module


@torch.inference_mode()
def medians(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Milliseconds of each, run in turns, each time after a run that is not counted, since the first one after another
    contender finds page tables and code out of cache."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def cycled(make: Callable[[], Callable[[Any], Any]], nbytes: int, x: torch.Tensor) -> Run:
    """x through one copy after another of a layer of so many bytes."""
    layers = itertools.cycle([make() for _ in range(max(2, CYCLED_BYTES // nbytes))])
    return lambda: next(layers)(x)


def fused(packed: PackedWeight, *, adapter: bool = True) -> Callable[[], FusedLinear]:
    return lambda: FusedLinear(repack_weight(packed), factors(packed) if adapter else None)


def row(in_features: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, in_features).to(torch.bfloat16)


def one_row() -> list[dict[str, Any]]:
    found = []
    for (out, width), bits, group in itertools.product(SHAPES, (2, 3), GROUP_SIZES):
        torch.compiler.reset()
        packed, x = weight(bits, out, width, group), row(width)
        host = stock(TorchLinear, packed, factors(packed))
        runs = {
            "fused": cycled(fused(packed), packed.nbytes, x),
            "dense": cycled(lambda out=out, width=width: _dense(out, width), out * width * 2, x),
            "compiled stock": lambda host=host, x=x: host(x),
            "stock": lambda host=host, x=x: _eager(host, x),
        }
        ms = medians(runs, REPEATS)
        found.append(_named(out, width, bits, group, ms, stock_over_fused=ms["stock"] / ms["fused"],
                            compiled_over_fused=ms["compiled stock"] / ms["fused"],
                            dense_over_fused=ms["dense"] / ms["fused"]))  # fmt: skip
    return found


def _eager(module: Callable[[Any], Any], x: torch.Tensor) -> Any:
    """Uncompiled, though it has been compiled before."""
    with torch.compiler.set_stance("force_eager"):
        return module(x)


def _dense(out: int, width: int) -> Run:
    matrix = (torch.randn(out, width) * 0.02).to(torch.bfloat16)
    return lambda x: linear(x, matrix)  # type: ignore[misc]


def bandwidth() -> list[dict[str, Any]]:
    found = []
    stream = torch.ones(CYCLED_BYTES * 2 // 8, dtype=torch.int64)
    for (out, width), group in itertools.product(SHAPES, GROUP_SIZES):
        packed, x = weight(2, out, width, group), row(width)
        repacked, lora = repack_weight(packed), factors(packed)
        ms = medians(
            {
                "stream": stream.sum,
                "bare": cycled(fused(packed, adapter=False), packed.nbytes, x),
                "adapter": cycled(fused(packed), packed.nbytes, x),
            },
            BANDWIDTH_REPEATS,
        )
        rate = stream.nbytes / ms.pop("stream")
        share = (lora.down.nbytes + lora.up.nbytes) / packed.nbytes
        found.append(_named(out, width, 2, group, ms, gigabytes_per_second=rate / 1e6,
                            bare_over_reading=ms["bare"] / (packed.nbytes / rate), adapter_bytes_share=share,
                            added_over_share=(ms["adapter"] / ms["bare"] - 1) / share,
                            repacked_over_packed=repacked.nbytes / packed.nbytes))  # fmt: skip
    return found


def shared() -> list[dict[str, Any]]:
    found = []
    for name, (width, outs) in SHARED.items():
        weights, x = [weight(2, out, width, 64) for out in outs], row(width)
        copies = max(2, CYCLED_BYTES // sum(one.nbytes for one in weights))
        layers = [[fused(one)() for one in weights] for _ in range(copies)]
        together = itertools.cycle([JointLinears(modules) for modules in layers])
        # Half a round apart, so that neither finds in cache what the other has read.
        alone = itertools.cycle(layers[copies // 2 :] + layers[: copies // 2])
        ms = medians(
            {
                "together": lambda together=together, x=x: next(together)(x),
                "alone": lambda alone=alone, x=x: [layer(x) for layer in next(alone)],
            },
            BANDWIDTH_REPEATS,
        )
        found.append({"modules": name, **{f"{kind} ms": value for kind, value in ms.items()},
                      "alone_over_together": ms["alone"] / ms["together"]})  # fmt: skip
    return found


@torch.inference_mode()
def adapter() -> list[dict[str, Any]]:
    found = []
    head = torch.ones(HEAD, dtype=torch.bfloat16)
    for rank in ADAPTER_RANKS:
        tokens = {"none": _layers(rank, 0), **{f"{bits} bits": _layers(rank, bits) for bits in (4, 8, 16)}}
        for rows, rounds in ADAPTER_ROWS.items():
            xs = {width: row(width, rows) for width, _ in LAYER}
            times: dict[str, list[float]] = {name: [] for name in tokens}
            for _ in range(rounds):
                for name, calls in tokens.items():
                    head.view(torch.int16).sum()
                    start = time.perf_counter()
                    for width, call in calls:
                        call(xs[width])
                    times[name].append((time.perf_counter() - start) * 1e3)
            # Others use the machine: the quarter of rounds that they disturbed least.
            ms = {name: statistics.quantiles(some, n=4)[0] for name, some in times.items()}
            adds = {f"{name} adds": value - ms["none"] for name, value in ms.items() if name != "none"}
            found.append({"rank": rank, "rows": rows, **{f"{name} ms": value for name, value in ms.items()}, **adds})
    return found


def _layers(rank: int, factor_bits: int) -> list[tuple[int, Callable[[torch.Tensor], torch.Tensor]]]:
    """The width that each call of a token reads, and the call; without factors for 0 bits."""

    def factor(width: int) -> torch.Tensor | QuantizedFactor:
        values = torch.randn(rank, width) * 0.02
        return values.bfloat16() if factor_bits == 16 else quantize_factor(values, factor_bits)

    def fused_linear(width: int, out: int) -> FusedLinear:
        factors = Factors(factor(width), factor(out)) if factor_bits else None
        return FusedLinear(repack_weight(weight(2, out, width, 64)), factors)

    return [(width, JointLinears([fused_linear(width, out) for out in outs]).joined)
            for _ in range(LAYERS) for width, outs in LAYER]  # fmt: skip


def four_bits() -> list[dict[str, Any]]:
    found = []
    hosts = {"aten": TorchAtenLinear, "avx512": TorchCpuAvx512Linear}
    for (out, width), group in itertools.product(SHAPES, GROUP_SIZES):
        packed, x = weight(4, out, width, group), row(width)
        runs = {"fused": cycled(fused(packed), packed.nbytes, x)}
        for name, kernel in hosts.items():
            runs[name] = cycled(
                lambda kernel=kernel, packed=packed: stock(kernel, packed, factors(packed)), packed.nbytes, x
            )
            with torch.inference_mode():
                for _ in range(CYCLED_BYTES // packed.nbytes):  # each repacks when it first runs
                    runs[name]()
        ms = medians(runs, REPEATS)
        found.append(_named(out, width, 4, group, ms,
                            best_host_over_fused=min(ms[name] for name in hosts) / ms["fused"]))  # fmt: skip
    return found


def prefill() -> list[dict[str, Any]]:
    found = []
    for (out, width), bits in itertools.product(SHAPES, (2, 3, 4)):
        packed, x, dense = weight(bits, out, width, 64), row(width, PREFILL_ROWS), _dense(out, width)
        layer = fused(packed)()
        ms = medians({"fused": lambda layer=layer, x=x: layer(x), "dense": lambda dense=dense, x=x: dense(x)},
                     PREFILL_REPEATS)  # fmt: skip
        found.append(_named(out, width, bits, 64, ms, dense_over_fused=ms["dense"] / ms["fused"]))
    return found


def _named(out: int, width: int, bits: int, group: int, ms: dict[str, float], **ratios: float) -> dict[str, Any]:
    result = {"out": out, "in": width, "bits": bits, "group": group,
              **{f"{name} ms": value for name, value in ms.items()}, **ratios}  # fmt: skip
    print(result, flush=True)
    return result


def model(base: common.Subject) -> list[dict[str, Any]]:
    with common.scratch() as folder, quiet():
        _quantized(base, folder / "model")
        path = str(folder / "model")
        models = {
            "fused": GPTQModel.load(path, dtype=torch.bfloat16).model,
            "dense": common.base_model(base),
            "stock": GPTQModel.load(path, dtype=torch.bfloat16, backend=BACKEND.GPTQ_TORCH).model,
        }
        prompt = common.tokenizer(base)("The history of the bridge began", return_tensors="pt").input_ids
        rates: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(MODEL_REPEATS + 1):
            for name, one in models.items():
                start = time.perf_counter()
                with torch.inference_mode():
                    one.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
                if turn:  # the first one warms up
                    rates[name].append(NEW_TOKENS / (time.perf_counter() - start))
    return [{f"{name} tokens per second": statistics.median(found) for name, found in rates.items()}]


def _quantized(base: common.Subject, folder: Path) -> None:
    host = GPTQModel.load(str(base.folder), QuantizeConfig(bits=2, group_size=64))
    calibration = common.calibration(base, MODEL_SAMPLES, MODEL_SEQLEN)
    host.quantize(calibration, batch_size=common.BATCH_SIZE, adapter=EoRA(rank=MODEL_RANK))
    host.save(str(folder))


def busy_seconds() -> tuple[float, float]:
    """Processor seconds of all processes (Linux), and of this one."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields[:3])
    own = os.times()
    return user + nice + system, own.user + own.system


def timed(part: Callable[[], list[dict[str, Any]]]) -> dict[str, Any]:
    """A part's rows, and the share of the machine that other processes took meanwhile."""
    busy, own = busy_seconds()
    start = time.perf_counter()
    rows = part()
    busy_after, own_after = busy_seconds()
    capacity = (time.perf_counter() - start) * (os.cpu_count() or 1)
    return {"others_share": (busy_after - busy - own_after + own) / capacity, "rows": rows}


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "one_row": one_row,
    "bandwidth": bandwidth,
    "shared": shared,
    "adapter": adapter,
    "four_bits": four_bits,
    "prefill": prefill,
}
MODEL_PARTS: dict[str, Callable[[common.Subject], list[dict[str, Any]]]] = {"model": model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, *MODEL_PARTS])
    common.add_model(parser)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    with common.subject(options) as base:
        path = base.results("kernels_cpu")
        result = common.kept(path)
        parts = common.parts(options.parts, PARTS, MODEL_PARTS, base)
        for part in parts:
            found = timed(PARTS[part] if part in PARTS else partial(MODEL_PARTS[part], base))
            result[part] = {"measured": common.measured(base if part in MODEL_PARTS else None), **found}
            common.keep(path, result)
    common.keep(path, result, as_json=options.json)
    for part in parts:
        rows = result[part]["rows"]
        print(f"{part}: other processes took {result[part]['others_share']:.1%} of the machine")
        common.table(tuple(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
