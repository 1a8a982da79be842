"""How fast are the CUDA kernels, beside GPTQModel's own with stock `Lora.apply`, and beside a dense bfloat16 linear?

linears    y = x Ŵᵀ + (x Aᵀ) Bᵀ, one module: `StackedLinears`, `TorchLinear` and `TritonV2Linear` with `Lora`, dense
inputs     q, k and v of Qwen3-8B: two launches for all three, against three stock modules
marlin     4 bits: `StackedLinears` beside `MarlinLinear`, which GPTQModel compiles on first use, with `EoRA` and `Lora`
correction `EoRA.apply` on the output of a kernel that is not ours, in one launch and in two products, and `Lora.apply`

Contenders take turns, and each cycles through copies of its weights that together exceed twice the last-level cache, so
that weights come from memory. Medians of rounds, in microseconds per call, called from Python and as a CUDA graph.
Results are compared with the oracle before anything is timed.

    python benchmarks/kernels_cuda.py --json
    python benchmarks/kernels_cuda.py --parts correction --ranks 32 64 128

Needs a CUDA or ROCm device.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from gptqmodel.adapter.adapter import Lora
from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.formats.factors import Factors
from gptqmodel_eora_ext.formats.packed_weights import PackedWeight
from gptqmodel_eora_ext.kernels.dispatch import CORRECTION, SWITCH
from gptqmodel_eora_ext.kernels.reference import dequantize, linear

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.kernels.cases import packed_weight, random_factors, random_input

# in × out; group 128, the usual size.
SHAPES = ((4096, 4096), (4096, 12288), (12288, 4096))
QKV = (4096, (4096, 1024, 1024))
GROUP_SIZE = 128
ROWS = (1, 16, 512)
BITS = (2, 3, 4)
ROUNDS = 21
# Largest relative error against the oracle: Ŵ, t and y rounded to bfloat16.
TOLERANCE = 1e-2
DTYPE = torch.bfloat16
Call = Callable[[torch.Tensor], Any]


def copies(nbytes: int) -> int:
    """How many of so many bytes exceed twice the last-level cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-2 * cache // nbytes))


def stock(cls: Any, weight: PackedWeight, factors: Factors, adapter: type[Lora] = Lora) -> Any:
    """GPTQModel's module with an adapter that is applied to its output."""
    down, up = factors.dense(DTYPE)
    module = cls(
        bits=weight.bits, group_size=weight.group_size, sym=True, desc_act=False, in_features=weight.in_features,
        out_features=weight.out_features, bias=False, pack_dtype=torch.int32, dtype=DTYPE,
        adapter=adapter(rank=factors.rank, path=None, lora_A=down.T, lora_B=up), name="benchmark",
    )  # fmt: skip
    tensors = {"qweight": weight.qweight.clone(), "qzeros": weight.qzeros, "g_idx": weight.g_idx,
               "scales": weight.scales.to(DTYPE)}  # fmt: skip
    for name, tensor in tensors.items():
        parameter = isinstance(getattr(module, name, None), torch.nn.Parameter)
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False) if parameter else tensor)
    module.lora_A, module.lora_B = down.T, up
    module.qzero_format(format=2)
    module.post_init()
    return module.eval()


def fused(weights: Sequence[PackedWeight], factors: Sequence[Factors]) -> Call:
    """The plugin's launches for modules that read the same input."""
    from gptqmodel_eora_ext.kernels.triton.ops import StackedLinears

    return StackedLinears.prepare(weights, factors, [None] * len(weights))


def dense(weight: torch.Tensor) -> Call:
    return lambda x: torch.nn.functional.linear(x, weight)


def one_by_one(modules: Sequence[Call]) -> Call:
    return lambda x: [module(x) for module in modules]


def adding(apply: Callable[[torch.Tensor, torch.Tensor], Any], base: torch.Tensor) -> Call:
    """A correction that is added to its own copy of ``base``."""
    y = base.clone()

    def call(x: torch.Tensor) -> torch.Tensor:
        apply(x, y)
        return y

    return call


def clones(weight: PackedWeight, factors: Factors, device: torch.device) -> list[tuple[PackedWeight, Factors]]:
    """The pair on the device, as often as it takes to leave the cache."""
    made = []
    for _ in range(copies(weight.nbytes)):
        down, up = (one.to(device) for one in (factors.down, factors.up))
        made.append((weight.to(device), Factors(down, up)))
    return made


def check(call: Call, x: torch.Tensor, expected: Sequence[torch.Tensor], name: str) -> None:
    """Stop at a result that is wrong."""
    found = call(x)
    for y, right in zip(found if isinstance(found, list) else [found], expected, strict=True):
        error = float((y.double() - right.double()).norm() / right.double().norm())
        if not error < TOLERANCE:
            raise SystemExit(f"{name} is wrong: relative error {error:.3g} at {tuple(x.shape)}.")


def measure(contenders: dict[str, list[Call]], x: torch.Tensor) -> dict[str, dict[str, float]]:
    """Median microseconds per call of each contender's calls, in turn."""

    def run(calls: Sequence[Call]) -> None:
        for call in calls:
            call(x)

    graphs = {}
    for name, calls in contenders.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(calls)
        stream.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            run(calls)
    taken: dict[str, dict[str, list[float]]] = {name: {"eager": [], "graph": []} for name in contenders}
    for _ in range(ROUNDS):
        for name, calls in contenders.items():
            taken[name]["eager"].append(timed(partial(run, calls)) / len(calls))
            taken[name]["graph"].append(timed(graphs[name].replay) / len(calls))
    return {name: {mode: sorted(times)[ROUNDS // 2] for mode, times in modes.items()} for name, modes in taken.items()}


def timed(call: Callable[[], Any]) -> float:
    """Microseconds on the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def linears(bits: int, in_features: int, out: int, rank: int, factor_bits: int, device: torch.device) -> list[Any]:
    weight = packed_weight(bits, out, in_features, GROUP_SIZE)
    factors = random_factors(weight, rank, factor_bits)
    pairs = clones(weight, factors, device)
    contenders: dict[str, list[Call]] = {
        "fused": [fused([w], [f]) for w, f in pairs],
        "TorchLinear + Lora": [stock(TorchLinear, w, f) for w, f in pairs],
    }
    if bits in TritonV2Linear.SUPPORTS_BITS:
        contenders["TritonV2Linear + Lora"] = [stock(TritonV2Linear, w, f) for w, f in pairs]
    plain = dequantize(pairs[0][0], torch.float32).to(DTYPE)
    denses = [dense(plain.clone()) for _ in range(copies(plain.nbytes))]
    return by_rows(contenders, {"dense bfloat16": denses}, pairs[0], factor_bits)


def by_rows(
    contenders: dict[str, list[Call]], unlike: dict[str, list[Call]], pair: tuple[PackedWeight, Factors], width: int
) -> list[Any]:
    """Rows of the table for one module; ``unlike`` compute something else and are timed alone, not checked."""
    weight, factors = pair
    rows = []
    for count in ROWS:
        x = random_input(count, weight.in_features, DTYPE).to(weight.qweight.device)
        expected = [linear(x.double(), weight, factors, accumulate=torch.float64)]
        for name, calls in contenders.items():
            check(calls[0], x, expected, name)
        what = f"{weight.in_features} → {weight.out_features}"
        rows += row_of(what, weight.bits, factors.rank, width, count, measure({**contenders, **unlike}, x))
    return rows


def marlin(in_features: int, out: int, rank: int, device: torch.device) -> list[Any]:
    weight = packed_weight(4, out, in_features, GROUP_SIZE)
    pairs = clones(weight, random_factors(weight, rank), device)
    contenders: dict[str, list[Call]] = {
        "fused": [fused([w], [f]) for w, f in pairs],
        "MarlinLinear + EoRA": [stock(MarlinLinear, w, f, EoRA) for w, f in pairs],
        "MarlinLinear + Lora": [stock(MarlinLinear, w, f) for w, f in pairs],
    }
    return by_rows(contenders, {}, pairs[0], 16)


def inputs(bits: int, rank: int, device: torch.device) -> list[Any]:
    in_features, outs = QKV
    weights = [packed_weight(bits, out, in_features, GROUP_SIZE) for out in outs]
    factors = [random_factors(weight, rank) for weight in weights]
    sets = list(zip(*(clones(*pair, device) for pair in zip(weights, factors, strict=True)), strict=False))
    together = [fused([w for w, _ in pairs], [f for _, f in pairs]) for pairs in sets]
    apart = [one_by_one([stock(TorchLinear, w, f) for w, f in pairs]) for pairs in sets]
    contenders = {"fused": together, "TorchLinear + Lora": apart}
    rows = []
    for count in ROWS:
        x = random_input(count, in_features, DTYPE).to(device)
        expected = [linear(x.double(), *pair, accumulate=torch.float64) for pair in sets[0]]
        for name, calls in contenders.items():
            check(calls[0], x, expected, name)
        rows += row_of("q, k and v", bits, rank, 16, count, measure(contenders, x))
    return rows


def correction(in_features: int, out: int, rank: int, device: torch.device) -> list[Any]:
    weight = packed_weight(4, out, in_features, GROUP_SIZE)
    factors = random_factors(weight, rank)
    nbytes = 2 * rank * (in_features + out)
    pairs = [Factors(*(one.to(DTYPE) for one in factors.dense())) for _ in range(copies(nbytes))]
    pairs = [Factors(pair.down.to(device), pair.up.to(device)) for pair in pairs]  # type: ignore[union-attr]

    def adapters(cls: type[Lora]) -> list[Lora]:
        return [cls(rank=rank, path=None, lora_A=pair.down.T, lora_B=pair.up) for pair in pairs]  # type: ignore[union-attr]

    kinds = {"EoRA.apply": adapters(EoRA), "Lora.apply": adapters(Lora)}
    os.environ[SWITCH] = CORRECTION
    kinds["EoRA.apply, two products"] = adapters(EoRA)
    del os.environ[SWITCH]
    rows = []
    for count in ROWS:
        x = random_input(count, in_features, DTYPE).to(device)
        base = random_input(count, out, DTYPE, seed=3).to(device)
        down, up = pairs[0].dense(torch.float64)
        expected = [base.double() + (x.double() @ down.T) @ up]
        contenders = {name: [adding(one.apply, base) for one in made] for name, made in kinds.items()}
        for name, calls in contenders.items():
            check(calls[0], x, expected, name)
        rows += row_of(f"correction {in_features} → {out}", 16, rank, 16, count, measure(contenders, x))
    return rows


def row_of(
    what: str, bits: int, rank: int, factor_bits: int, rows: int, times: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    return [
        {"what": what, "bits": bits, "rank": rank, "factor bits": factor_bits, "rows": rows, "contender": name,
         "eager µs": modes["eager"], "graph µs": modes["graph"]}
        for name, modes in times.items()
    ]  # fmt: skip


def corrections(rank: int, device: torch.device) -> list[Any]:
    return [row for shape in SHAPES for row in correction(*shape, rank, device)]


def all_inputs(rank: int, device: torch.device) -> list[Any]:
    return [row for bits in BITS for row in inputs(bits, rank, device)]


def all_linears(rank: int, device: torch.device) -> list[Any]:
    cases = itertools.product(BITS, SHAPES, (16, 4))
    return [row for bits, shape, factor_bits in cases for row in linears(bits, *shape, rank, factor_bits, device)]


def beside_marlin(rank: int, device: torch.device) -> list[Any]:
    return [row for shape in SHAPES for row in marlin(*shape, rank, device)]


PARTS = {"correction": corrections, "inputs": all_inputs, "linears": all_linears, "marlin": beside_marlin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[64], help="ranks to measure")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("No CUDA or ROCm device: these kernels can only be timed on one. "
                         "benchmarks/kernels_roofline.py computes what they must move.")  # fmt: skip
    device = torch.device("cuda", 0)
    path = common.RESULTS / "kernels_cuda.json"
    result = common.kept(path)
    for part in options.parts:
        with torch.inference_mode():
            rows = [row for rank in options.ranks for row in PARTS[part](rank, device)]
        result[part] = {"measured": common.measured(), "dtype": str(DTYPE), "rows": rows}
        common.keep(path, result)
    common.keep(path, result, as_json=options.json)
    for part in options.parts:
        rows = result[part]["rows"]
        common.table(tuple(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
