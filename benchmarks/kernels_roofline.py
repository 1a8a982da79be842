"""What the CUDA kernels must move and issue for one token, against stock: computed, not measured.

Bytes and launches per decoder layer for Qwen3's shapes, the least time that a GPU's memory allows for them, and the
instructions that the compiled inner loops issue per weight. docs/kernels.md holds what this prints.

    python -m benchmarks.kernels_roofline            # the tables
    python -m benchmarks.kernels_roofline --issue    # also compile the GEMV and count (needs Triton, no GPU)
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HALF = 2
FLOAT = 4
GROUP_SIZE = 128
RANKS = (32, 64, 128, 256)
# Group size of packed factors, one float16 scale each (`solve.quantized`).
FACTOR_GROUP = 64
# H100 SXM by the vendor's figures: bytes/s, and instructions/s over all lanes (multiprocessors × 128 × boost clock).
BANDWIDTH = 3.35e12
INSTRUCTIONS = 132 * 128 * 1.98e9


@dataclass(frozen=True)
class Model:
    """Decoder layers, and in each the inputs with the widths of the linears that read them."""

    layers: int
    inputs: tuple[tuple[int, tuple[int, ...]], ...]


MODELS = {
    "Qwen3-8B": Model(36, ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (12288, 12288)), (12288, (4096,)))),
    "Qwen3-32B": Model(64, ((5120, (8192, 1024, 1024)), (8192, (5120,)), (5120, (25600, 25600)), (25600, (5120,)))),
}


def weight_bytes(in_features: int, out: int, bits: int) -> float:
    """Codes and scales of a symmetric weight; the zeros of an asymmetric one add bits / 8 per scale."""
    return in_features * out * bits / 8 + in_features / GROUP_SIZE * out * HALF


def factor_bytes(in_features: int, out: int, rank: int, bits: int) -> float:
    """A and B."""
    each = HALF if bits == 16 else bits / 8 + HALF / FACTOR_GROUP
    return rank * (in_features + out) * each


def fused(model: Model, bits: int, rank: int, factor_bits: int) -> tuple[float, int]:
    """Bytes and launches of a layer: two launches an input, partial sums of t written and read once.

    Partial sums of y stay in the last-level cache and are not counted.
    """
    total = 0.0
    for in_features, outs in model.inputs:
        total += sum(weight_bytes(in_features, out, bits) for out in outs)
        total += sum(factor_bytes(in_features, out, rank, factor_bits) for out in outs)
        total += 2 * in_features * HALF + sum(outs) * HALF + 2 * len(outs) * rank * FLOAT
    return total, 2 * len(model.inputs)


def stock(model: Model, bits: int, rank: int) -> tuple[float, int]:
    """The same where GPTQModel dequantises and multiplies (2 and 3 bits): Ŵ written and read in 16 bits, then x A,
    (·) B and the addition. One launch to dequantise, which 3 bits exceed."""
    total, launches = 0.0, 0
    for in_features, outs in model.inputs:
        for out in outs:
            total += weight_bytes(in_features, out, bits) + 2 * in_features * out * HALF + (in_features + out) * HALF
            total += factor_bytes(in_features, out, rank, 16) + (in_features + 2 * rank + 4 * out) * HALF
            launches += 2 + 3
    return total, launches


def fused_base(model: Model, bits: int, rank: int) -> tuple[float, int]:
    """The same with a host kernel that reads packed weights (Marlin, 4 bits) and stock `Lora.apply`: 1 + 3 launches."""
    total, launches = stock(model, bits, rank)
    dense = sum(2 * in_features * out * HALF for in_features, outs in model.inputs for out in outs)
    return total - dense, launches - sum(len(outs) for _, outs in model.inputs)


def dense(model: Model) -> tuple[float, int]:
    """16-bit weights without quantisation: what the bytes are saved from."""
    total = sum((in_features * out + in_features + out) * HALF for in_features, outs in model.inputs for out in outs)
    return total, sum(len(outs) for _, outs in model.inputs)


def tables() -> str:
    """Markdown."""
    lines = []
    for name, model in MODELS.items():
        plain, count = dense(model)
        lines += [
            f"**{name}**, one layer, one token; the last column is all {model.layers} layers at "
            f"{BANDWIDTH / 1e12:.2f} TB/s. Dense 16-bit: {plain / 1e6:.0f} MB, {count} launches, "
            f"{model.layers * plain / BANDWIDTH * 1e3:.2f} ms.",
            "",
            "| bits | rank | fused MB | adapter's share | 4-bit factors | launches | stock MB | launches | least ms |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for bits, rank in itertools.product((2, 3, 4), RANKS):
            ours, launches = fused(model, bits, rank, 16)
            packed, _ = fused(model, bits, rank, 4)
            bare, _ = fused(model, bits, 0, 16)
            theirs, their_launches = (fused_base if bits == 4 else stock)(model, bits, rank)
            lines.append(
                f"| {bits} | {rank} | {ours / 1e6:.1f} | {1 - bare / ours:.0%} | {packed / 1e6:.1f} MB, "
                f"{1 - bare / packed:.0%} | {launches} | {theirs / 1e6:.1f} | {their_launches} | "
                f"{model.layers * ours / BANDWIDTH * 1e3:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def issue_table() -> str:
    """Instructions of the GEMV's loop over the inputs per weight, counted in the machine code, and what they allow."""
    import torch
    import triton

    from tests.kernels.compiled import TARGETS, Case, compiled

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    lines = [
        "| bits | instructions per weight (sm_90) | H100: share of the bandwidth that they allow |",
        "|---|---|---|",
    ]
    target = next(target for target in TARGETS if target.arch == 90)
    for bits in (2, 3, 4, 8):
        kernel, args, options = Case(bits, 1, torch.float16, sym=True).launches()[1]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled(kernel, args, options, target).asm["cubin"])
            file.flush()
            code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
        counted = per_weight(code, windows={2: 2, 3: 4}.get(bits, 1))
        allowed = INSTRUCTIONS / counted * bits / 8 / BANDWIDTH
        lines.append(f"| {bits} | {counted:.1f} | {'all' if allowed > 1 else f'{allowed:.0%}'} |")
    return "\n".join(lines)


def per_weight(code: str, windows: int) -> float:
    """Instructions of the first outermost loop per multiplication with a weight, from `cuobjdump -sass`.

    The loop over windows inside it is run ``windows`` times; it is the one that multiplies most.
    """
    listing = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    loops = []
    for address, text in listing:
        jump = re.search(r"BRA (?:`\(.*\) )?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            loops.append((int(jump[1], 16), address))
    multiplications = {
        loop: sum("FFMA" in text for address, text in listing if loop[0] <= address <= loop[1]) for loop in loops
    }
    inner = min((loop for loop in loops if multiplications[loop] == max(multiplications.values())),
                key=lambda loop: loop[1] - loop[0])  # fmt: skip
    around = [loop for loop in loops if loop[0] < inner[0] and inner[1] < loop[1]]
    length = (inner[1] - inner[0]) // 16 + 1
    if not around:
        return length / multiplications[inner]
    outer = min(around, key=lambda loop: loop[1] - loop[0])
    rest = (outer[1] - outer[0]) // 16 + 1 - length
    return (length * windows + rest) / (multiplications[inner] * windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--issue", action="store_true", help="compile the GEMV and count its instructions")
    options = parser.parse_args()
    print(tables())
    if options.issue:
        print(issue_table())


if __name__ == "__main__":
    main()
