"""Are NVIDIA's compiled kernels right on a GPU, and how fast are they beside Triton's and beside dense bfloat16?

right      both kernels against the oracle, over bits, groups, rows, dtypes, factors, each case several times
called     one call from Python, microseconds of the caller: compiled, Triton's, a dense linear
one_row    one row in a graph: several ways to cut it, Triton's two launches, and what the bytes would take
rows       2 to 16 rows in a graph, beside Triton's
many       17 to 2,048 rows in a graph, beside Triton's or the dense path, and beside a dense bfloat16 linear

Weights are random and made on the device; each contender cycles through copies that together exceed twice the
last-level cache. Medians of interleaved rounds. Needs torch, Triton and this package, no GPTQModel. No GPU has run it
yet.

    export GPTQMODEL_EORA_EXT_KERNELS_ON=cuda
    python benchmarks/kernels_compiled.py
    compute-sanitizer --tool racecheck python benchmarks/kernels_compiled.py --parts right    # and memcheck
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_EORA_EXT_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import torch

from gptqmodel_eora_ext.formats.factors import Factors
from gptqmodel_eora_ext.formats.packed_weights import PackedWeight, pack_words
from gptqmodel_eora_ext.kernels.cuda import few_rows
from gptqmodel_eora_ext.kernels.cuda.build import device_of
from gptqmodel_eora_ext.kernels.dispatch import ASKED, CUDA, asked_for
from gptqmodel_eora_ext.kernels.reference import linear
from gptqmodel_eora_ext.kernels.triton import ops
from gptqmodel_eora_ext.kernels.triton.ops import StackedLinears
from tests.kernels.cases import packed_weight, random_factors, random_input

RESULT = common.RESULTS / "kernels_compiled.json"
DTYPE = torch.bfloat16
GROUP_SIZE, RANK = 128, 64
SHAPES = ((4096, (4096,)), (4096, (12288,)), (12288, (4096,)), (4096, (4096, 1024, 1024)))
# Bytes a second of an H100's memory by its vendor.
BANDWIDTH = 3.35e12
ROUNDS = 15
CALLS = 40
# ‖y − ŷ‖ / ‖ŷ‖: y rounded; Ŵ and t too of many rows.
TOLERANCE = {torch.float16: 8e-4, torch.bfloat16: 6e-3}
# Ways to cut one row: warps that multiply and warps that serve the adapter.
CUTS = ((16, 4), (16, 2), (16, 1), (8, 4), (8, 2), (8, 1), (4, 1))
Call = Callable[[torch.Tensor], Any]


def random_weight(bits: int, in_features: int, out: int, device: torch.device, seed: int) -> PackedWeight:
    """Symmetric, made on the device."""
    generator = torch.Generator(device=device).manual_seed(seed)
    words, groups = -(-in_features * bits // 32), in_features // GROUP_SIZE
    codes = torch.randint(-(2**31), 2**31 - 1, (words, out), dtype=torch.int32, device=device, generator=generator)
    scales = (torch.rand(groups, out, device=device, generator=generator) + 0.5) * in_features**-0.5 / (1 << (bits - 1))
    zeros = pack_words(torch.full((out, 1), 1 << (bits - 1), dtype=torch.int32), bits)
    return PackedWeight(
        qweight=codes, qzeros=zeros.T.expand(groups, -1).contiguous().to(device), scales=scales.to(torch.float16),
        g_idx=None, bits=bits, group_size=GROUP_SIZE, in_features=in_features, out_features=out,
    )  # fmt: skip


def random_pair(in_features: int, out: int, device: torch.device) -> Factors:
    down = torch.randn(RANK, in_features, device=device) * in_features**-0.5
    up = torch.randn(RANK, out, device=device) * RANK**-0.5
    return Factors(down.to(DTYPE), up.to(DTYPE))


def copies(nbytes: int) -> int:
    """How many of so many bytes exceed twice the last-level cache."""
    return max(2, -(-2 * torch.cuda.get_device_properties(0).L2_cache_size // nbytes))


def sets(bits: int, in_features: int, outs: Sequence[int], device: torch.device) -> list[StackedLinears]:
    """Modules of one input, as often as it takes to leave the cache."""
    count = copies(sum(outs) * in_features * bits // 8)
    return [
        StackedLinears.prepare(
            [random_weight(bits, in_features, out, device, seed) for out in outs],
            [random_pair(in_features, out, device) for out in outs], [None] * len(outs),
        )
        for seed in range(count)
    ]  # fmt: skip


def graphed(calls: Sequence[Call], x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, int]:
    def run() -> None:
        for call in calls:
            call(x)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph, len(calls)


def medians(contenders: dict[str, list[Call]], x: torch.Tensor) -> dict[str, float]:
    """Microseconds a call of each, in turn."""
    graphs = {name: graphed(calls, x) for name, calls in contenders.items()}
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, (graph, count) in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken[name].append(start.elapsed_time(end) * 1e3 / count)
    return {name: round(statistics.median(times), 2) for name, times in taken.items()}


def tritons(stacked: StackedLinears) -> Call:
    """Its launches, whatever the compiled kernels serve."""
    without = ops.replace(stacked, compiled=None)
    return lambda x: ops._linears(x, without)


def compiled_many(stacked: StackedLinears) -> Call:
    assert stacked.compiled is not None and stacked.compiled.many is not None
    launch = stacked.compiled.many
    return lambda x: launch(x, ops._components(x, stacked, None))


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def right(device: torch.device) -> list[dict[str, Any]]:
    drawn = random.Random(0)
    rows_of = (1, 1, 2, 5, 8, 9, 16, 17, 40, 64, 70, 130, 300)
    found = []
    for bits, group_size, rows in itertools.product((2, 3, 4), (32, 64, 128, 256, -1), rows_of):
        dtype, rank = drawn.choice((torch.bfloat16, torch.float16)), drawn.choice((None, 8, 21, 64, 70))
        factor_bits, sym = drawn.choice((16, 8, 4)), drawn.choice((True, False))
        in_features, out = drawn.choice(((512, 256), (1024, 136), (2048, 1000), (768, 72)))
        weights = [packed_weight(bits, one, in_features, group_size, sym=sym, seed=one) for one in (out, 40)]
        pairs = [random_factors(one, rank, factor_bits, seed=3) if rank else None for one in weights]
        biases = [torch.linspace(-1, 1, out, device=device), None]
        moved = [one.to(device) for one in weights]
        factors = [None if one is None else Factors(one.down.to(device), one.up.to(device)) for one in pairs]
        stacked = StackedLinears.prepare(moved, factors, biases)
        x = random_input(rows, in_features, dtype).to(device)
        compiled = stacked.compiled
        if compiled is None or (compiled.few if rows <= few_rows.MOST_ROWS else compiled.many) is None:
            continue
        call = compiled.few if rows <= few_rows.MOST_ROWS else compiled_many(stacked)
        assert call is not None
        errors = []
        for _ in range(3):
            for y, weight, pair, bias in zip(call(x), moved, factors, biases, strict=True):
                expected = linear(x.double(), weight, pair, None if bias is None else bias.double(),
                                  accumulate=torch.float64)  # fmt: skip
                errors.append(error(y, expected))
        case = [bits, group_size, rows, str(dtype)[6:], rank, factor_bits, sym, in_features, out]
        found.append({"case": case, "error": max(errors), "right": max(errors) < TOLERANCE[dtype]})
        if not found[-1]["right"]:
            print("WRONG", found[-1], flush=True)
    print(f"{sum(one['right'] for one in found)} of {len(found)} cases right", flush=True)
    return [one for one in found if not one["right"]] or [{"cases": len(found), "right": True}]


def called(device: torch.device) -> list[dict[str, Any]]:
    stacked = sets(2, 4096, (4096,), device)[0]
    three = sets(2, 4096, (4096, 1024, 1024), device)[0]
    dense = torch.randn(4096, 4096, device=device, dtype=DTYPE)
    x = torch.randn(1, 1, 4096, device=device, dtype=DTYPE)
    calls: dict[str, Call] = {
        "compiled": stacked, "compiled, q, k and v": three, "Triton's": tritons(stacked),
        "dense": lambda x: torch.nn.functional.linear(x, dense),
    }  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call(x)
            taken[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return [{name: round(statistics.median(times), 2) for name, times in taken.items()}]


def cut(stacked: StackedLinears, warps: int, helpers: int, x: torch.Tensor) -> Call:
    """The launch for one row, cut in this way; its first call decides."""
    known = device_of(x.device)
    assert known is not None
    launch = few_rows.FewRows(stacked, known)
    usual = few_rows.warps_of
    few_rows.warps_of = lambda *_: (warps, helpers)
    launch(x)
    few_rows.warps_of = usual
    return launch


def one_row(device: torch.device) -> list[dict[str, Any]]:
    found = []
    for bits, (in_features, outs) in itertools.product((2, 3, 4), SHAPES):
        made = sets(bits, in_features, outs, device)
        x = torch.randn(1, in_features, device=device, dtype=DTYPE)
        # Blocks of 16 warps for tiles that do not fill the device more than once.
        alone = sum(outs) // few_rows.COLUMNS <= 2 * torch.cuda.get_device_properties(0).multi_processor_count
        contenders: dict[str, list[Call]] = {"as planned": [one.compiled.few for one in made]}  # type: ignore[union-attr, misc]
        for warps, helpers in CUTS:
            if alone or warps <= few_rows.FEW_WARPS:
                contenders[f"{warps} + {helpers} warps"] = [cut(one, warps, helpers, x) for one in made]
        contenders["Triton's"] = [tritons(one) for one in made]
        expected = contenders["Triton's"][0](x)[0]
        for name, calls in contenders.items():
            if not error(calls[0](x)[0], expected) < 2 * TOLERANCE[DTYPE]:
                print("WRONG", bits, in_features, outs, name, flush=True)
        nbytes = sum(q.nbytes + s.nbytes for q, s in zip(made[0].qweights, made[0].scales, strict=True))
        nbytes += 2 * RANK * sum(in_features + out for out in outs)
        row = {"bits": bits, "in": in_features, "outs": list(outs), "bytes µs": round(nbytes / BANDWIDTH * 1e6, 2)}
        found.append({**row, **medians(contenders, x)})
        print(json.dumps(found[-1]), flush=True)
    return found


def rows(device: torch.device) -> list[dict[str, Any]]:
    found = []
    for bits, out in itertools.product((2, 3), (4096, 12288)):
        made = sets(bits, 4096, (out,), device)
        for count in (2, 4, 8, 16):
            x = torch.randn(count, 4096, device=device, dtype=DTYPE)
            contenders = {"compiled": [one.compiled.few for one in made], "Triton's": [tritons(one) for one in made]}  # type: ignore[union-attr, misc]
            found.append({"bits": bits, "in": 4096, "out": out, "rows": count, **medians(contenders, x)})  # type: ignore[arg-type]
            print(json.dumps(found[-1]), flush=True)
    return found


def many(device: torch.device) -> list[dict[str, Any]]:
    found = []
    cases = [(2, 4096, 4096), (2, 4096, 12288), (2, 12288, 4096), (2, 4096, 1024), (3, 4096, 4096), (4, 4096, 4096)]
    for bits, in_features, out in cases:
        made = sets(bits, in_features, (out,), device)
        dense = [
            torch.randn(out, in_features, device=device, dtype=DTYPE) * 0.02
            for _ in range(copies(2 * in_features * out))
        ]
        for count in (17, 32, 64, 128, 256, 512, 1024, 2048) if bits == 2 else (64, 512):
            x = torch.randn(count, in_features, device=device, dtype=DTYPE)
            contenders: dict[str, list[Call]] = {
                "compiled": [compiled_many(one) for one in made],
                "Triton's": [tritons(one) for one in made],
                "dense": [lambda x, w=w: torch.nn.functional.linear(x, w) for w in dense],  # type: ignore[misc]
            }
            if not error(contenders["compiled"][0](x)[0], contenders["Triton's"][0](x)[0]) < 2 * TOLERANCE[DTYPE]:
                print("WRONG", bits, in_features, out, count, flush=True)
            found.append({"bits": bits, "in": in_features, "out": out, "rows": count, **medians(contenders, x)})
            print(json.dumps(found[-1]), flush=True)
    return found


PARTS = {"right": right, "called": called, "one_row": one_row, "rows": rows, "many": many}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "No CUDA device: these kernels can only be timed on one; tests/kernels/test_cuda.py emulates them."
        )
    device = torch.device("cuda", 0)
    if CUDA not in asked_for() or device_of(device) is None:
        raise SystemExit(f"The compiled kernels are not to be had: set {ASKED}={CUDA}, and see the log.")
    result = common.kept(options.out)
    for part in options.parts:
        start = time.perf_counter()
        with torch.inference_mode():
            found = PARTS[part](device)
        seconds = round(time.perf_counter() - start, 1)
        result[part] = {"measured": common.measured(), "seconds": seconds, "rows": found}
        common.keep(options.out, result)
        print(part, seconds, "s", flush=True)
        if part == "called":
            print(found, flush=True)


if __name__ == "__main__":
    main()
