"""What scales how: bytes sent a layer, operations of each process and seconds, for 8B, 32B and 72B on 1, 8 and 64 GPUs,
and the largest model for one GPU of 24 GB. Writes the tables of docs/scaling.md.

    python benchmarks/scaling.py            # print
    python benchmarks/scaling.py --write    # into docs/scaling.md, between its marks

Nothing is run. Seconds of one H200 come from results/gpu_day.json: of a layer of Qwen3-8B's shapes they were measured
whole, of the wider models capture and solving at their shapes, and the host's GPTQ and the rest are scaled from the
8B's. How parts are shared out follows the code: `capture.panels_of` cuts sums, `system.distributed.deal` deals modules.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptqmodel_eora_ext.adapter.layers import solving_cost
from gptqmodel_eora_ext.capture import panels_of
from gptqmodel_eora_ext.system.distributed import deal

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "benchmarks" / "results" / "gpu_day.json"
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- scaling -->", "<!-- /scaling -->"
# Hidden width, MLP width, heads × head_dim, key-value heads × head_dim, layers: as in gpu_day_costs.py, which measured
# at these shapes and cannot be imported without GPTQModel.
MODELS = {
    "Qwen3-8B": (4096, 12288, 4096, 1024, 36),
    "Qwen2.5-32B": (5120, 27648, 5120, 1024, 64),
    "Qwen2.5-72B": (8192, 29568, 8192, 1024, 80),
}
MEASURED_MODEL = "Qwen3-8B"
GPUS = (1, 8, 64)
RANK, GROUP_SIZE = 64, 64
WINDOW = 2048
# Forwards of a layer over all windows: one for each of the four subsets up to where it ends, and one for its outputs.
# The first ends at q/k/v, so that together they are some three whole ones.
FORWARDS = 3
# Operations a second of a layer's forwards in bfloat16: two fifths of an H200's peak. Assumed, not measured.
FORWARD_RATE = 4e14
# Of the rank whose solving was measured at every shape on a warm GPU; only how shapes compare is taken from it.
SOLVED_RANK = 128
# Sums of in × in in float32 that are in memory while the widest module is quantised: the Hessian, its permuted copy,
# the Cholesky factor, the inverse, and the adapter's copy. With W, its permuted copy and the error, and the layer in 16
# bits, that makes 4.0 of the 5.3 GB that the 8B's peak was measured at; the rest is taken to be the same for all.
SUMS_AT_ONCE, WEIGHTS_AT_ONCE = 5, 3
SMALL_GPU, SMALL_HOST = 24e9, 64e9


@dataclass(frozen=True)
class Shape:
    """A model's layer.

    Attributes:
        subsets: modules that are quantised together, as pairs of out and in features.
        layers: number of layers.
    """

    subsets: tuple[tuple[tuple[int, int], ...], ...]
    layers: int

    @classmethod
    def of(cls, hidden: int, inner: int, query: int, key: int, layers: int) -> Shape:
        return cls((((query, hidden), (key, hidden), (key, hidden)), ((hidden, query),),
                    ((inner, hidden), (inner, hidden)), ((hidden, inner),)), layers)  # fmt: skip

    @property
    def modules(self) -> list[tuple[int, int]]:
        return [one for subset in self.subsets for one in subset]

    @property
    def weights(self) -> int:
        return sum(out * into for out, into in self.modules)

    @property
    def widths(self) -> list[int]:
        """Of the inputs that are summed, one for each subset."""
        return [subset[0][1] for subset in self.subsets]


def bytes_a_layer(shape: Shape, processes: int) -> dict[str, float]:
    """Bytes that reach a process for a layer: sums from the one before it, and every module that another has made."""
    if processes == 1:
        return {"sums": 0.0, "modules": 0.0}
    sums = sum(4.0 * width**2 for width in shape.widths)
    each = 0.0
    for out, into in shape.modules:
        # Ŵ in 16 bits, scales and zeros in 16 or 32 bits a group, factors in 16 bits.
        each += 2 * out * into + 6 * out * into / GROUP_SIZE + 2 * RANK * (out + into)
    return {"sums": sums, "modules": each * (processes - 1) / processes}


def operations(shape: Shape, processes: int, tokens: int) -> dict[str, float]:
    """Operations of the busiest process over all layers, in 10¹² : capture and solving."""
    windows = -(-tokens // WINDOW // processes) * WINDOW
    forwards = FORWARDS * 2 * windows * shape.weights
    # GPTQ multiplies the whole of XᵀX.
    sums = sum(2 * windows * width**2 for width in shape.widths)
    loads = [0.0] * processes
    for _ in range(shape.layers):
        for subset in shape.subsets:
            deal([2 * solving_cost(*one) for one in subset], loads)
    return {"capture": shape.layers * (forwards + sums) / 1e12, "solve": max(loads) / 1e12}


def seconds_a_layer(shape: Shape, processes: int, measured: dict[str, Any]) -> dict[str, float]:
    """Seconds of a layer by its parts, without those of sending.

    GPTQ's seconds on a GPU go by columns, which it takes one after another. Modules of a subset are solved at once, and
    subsets one after another: the busiest process of each counts. What is left of the measured layer after sums, GPTQ
    and the forwards is taken to be serial: rank 0 packs.
    """
    figures = measured["qwen3_8b_layers"]["figures"]
    plain, whole = figures["plain: seconds a layer"], figures["rank 64: seconds a layer"]
    first = Shape.of(*MODELS[MEASURED_MODEL])
    solver = measured["solver"]["figures"]
    captured = {int(width): value for width, value in solver["captured"].items()}

    def compensated(one: Shape) -> list[float]:
        return [solver["solved"][f"{out} x {into}"][f"compensate, rank {SOLVED_RANK}"] for out, into in one.modules]

    # Of the measured 8B layer: a second of sums as measured alone, a column of GPTQ, and a second of solving alone.
    a_sum = plain["host: Hessians"] / sum(captured[width] for width in first.widths)
    a_column = plain["host: GPTQ"] / sum(into for _, into in first.modules)
    a_solution = (whole["all"] - plain["all"]) / sum(compensated(first))
    forwards = FORWARDS * 2 * figures["tokens"] * shape.weights / FORWARD_RATE
    forwards_of_first = FORWARDS * 2 * figures["tokens"] * first.weights / FORWARD_RATE
    left = plain["all"] - plain["host: Hessians"] - plain["host: GPTQ"] - forwards_of_first
    sums = 0.0
    for width in shape.widths:
        panels = len(panels_of(width, processes))
        sums += a_sum * captured[width] * (panels + processes - 1) / (panels * processes)
    solving = 0.0
    seconds = iter(compensated(shape))
    for subset in shape.subsets:
        loads = [0.0] * processes
        deal([a_column * into + a_solution * next(seconds) for _, into in subset], loads)
        solving += max(loads)
    serial = left * shape.weights / first.weights
    return {"sums": sums, "solve": solving, "forwards": forwards / processes, "serial": serial}


def gpu_peak(shape: Shape, measured: dict[str, Any]) -> float:
    """Bytes of GPU memory for a layer, computed from its widest module; the 8B's own is the one that was measured."""

    def counted(one: Shape) -> float:
        out, into = max(one.modules, key=lambda module: SUMS_AT_ONCE * module[1] ** 2 + WEIGHTS_AT_ONCE * module[0]
                        * module[1])  # fmt: skip
        return 4.0 * (SUMS_AT_ONCE * into**2 + WEIGHTS_AT_ONCE * out * into) + 2 * one.weights

    first = Shape.of(*MODELS[MEASURED_MODEL])
    constant = measured["qwen3_8b_layers"]["figures"]["rank 64: peak GPU bytes"] - counted(first)
    return counted(shape) + constant


def host_peak(shape: Shape, tokens: int) -> float:
    """Bytes of the host's memory, all in 16 bits: a layer's inputs and outputs at all tokens, two layers' weights."""
    hidden = shape.subsets[0][0][1]
    return 2 * 2.0 * tokens * hidden + 2 * 2 * shape.weights


def tables(measured: dict[str, Any]) -> str:
    tokens = measured["qwen3_8b_layers"]["figures"]["tokens"]
    lines = [
        f"GPTQ at 2 bits with `EoRA(rank={RANK})`, {tokens:,} calibration tokens ({tokens // WINDOW} windows of "
        f"{WINDOW:,}), an H200 for each process. Bytes reach a process for a layer; operations (in 10¹², over all "
        f"layers) are those of the busiest process; seconds are a layer's, without those of sending:",
        "",
        "| model | GPUs | bytes: sums | modules | operations: capture | solving | seconds: sums | forwards | solving | "
        "serial | the whole model | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, sizes in MODELS.items():
        shape = Shape.of(*sizes)
        for processes in GPUS:
            sent, done = bytes_a_layer(shape, processes), operations(shape, processes, tokens)
            took = seconds_a_layer(shape, processes, measured)
            how = "the layer's sum measured" if name == MEASURED_MODEL and processes == 1 else "computed"
            lines.append(
                f"| {name} | {processes} | {sent['sums'] / 1e9:.2f} GB | {sent['modules'] / 1e9:.2f} GB | "
                f"{done['capture']:,.0f} | {done['solve']:,.0f} | {took['sums']:.2f} | {took['forwards']:.2f} | "
                f"{took['solve']:.2f} | {took['serial']:.2f} | {shape.layers * sum(took.values()) / 60:.1f} min | "
                f"{how} |"
            )
    lines += [
        "",
        f"One GPU of {SMALL_GPU / 1e9:.0f} GB and {SMALL_HOST / 1e9:.0f} GB of memory:",
        "",
        "| model | GPU memory | host memory | fits | |",
        "|---|---|---|---|---|",
    ]
    for name, sizes in MODELS.items():
        shape = Shape.of(*sizes)
        gpu, host = gpu_peak(shape, measured), host_peak(shape, tokens)
        fits = "yes" if gpu <= SMALL_GPU and host <= SMALL_HOST else "no"
        how = "GPU measured, host computed" if name == MEASURED_MODEL else "computed"
        lines.append(f"| {name} | {gpu / 1e9:.1f} GB | {host / 1e9:.1f} GB | {fits} | {how} |")
    lines += [
        "",
        f"Of models shaped as the 72B (an MLP 3.6 times as wide as the hidden width) the widest that fits has an MLP "
        f"of {_widest(measured):,} (computed).",
    ]
    return "\n".join(lines)


def _widest(measured: dict[str, Any]) -> int:
    """The widest MLP, in steps of 256, whose layer fits the small GPU."""
    hidden, inner, query, key, layers = MODELS["Qwen2.5-72B"]
    width = 0
    for candidate in range(1024, 1 << 17, 256):
        scale = candidate / inner
        shape = Shape.of(int(hidden * scale), candidate, int(query * scale), key, layers)
        if gpu_peak(shape, measured) > SMALL_GPU:
            break
        width = candidate
    return width


def written(page: str, text: str) -> str:
    """The page with ``text`` between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    options = parser.parse_args()
    parts = json.loads(MEASURED.read_text(encoding="utf-8"))["parts"]
    text = tables(parts)
    print(text)
    if options.write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
