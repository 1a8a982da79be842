"""What the compiled CUDA kernels become as machine code, without a GPU: needs NVIDIA's compiler, and Triton's tools.

    python -m tests.kernels.cuda.assembled

compiles them for every architecture, prints what a thread takes and how many instructions a weight, and fails if a
register is spilled to memory. A few minutes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

from gptqmodel_eora_ext.kernels.cuda.build import SOURCES, flags
from gptqmodel_eora_ext.kernels.cuda.structures import UNIT_CODES

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
COMPILER = shutil.which("nvcc")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Assembled:
    """One instance of a kernel.

    Attributes:
        name: as `few_rows<2, 2, true, 1>`.
        registers: of a thread.
        spilled: bytes of registers that a thread keeps in memory.
        loop: instructions of the innermost loop that multiplies, branches that exclude each other counted both; 0 where
            the kernel is not made for the architecture.
    """

    name: str
    registers: int
    spilled: int
    loop: int

    @property
    def per_weight(self) -> float | None:
        """At most so many instructions for each weight that a lane multiplies by one row; None for many rows."""
        arguments = re.fullmatch(r"few_rows<(\d), (\d), \w+, 1>", self.name)
        if arguments is None:
            return None
        bits, steps = (int(one) for one in arguments.groups())
        return self.loop / (4 * UNIT_CODES[bits] * steps)


def assembled(capability: tuple[int, int]) -> list[Assembled]:
    """All instances for devices of a compute capability."""
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as scratch:
        binary = Path(scratch, "kernels.cubin")
        command = [
            COMPILER,
            *flags(capability),
            "-Xptxas",
            "-v",
            "--cubin",
            str(SOURCES / "entry.cu"),
            "-o",
            str(binary),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        code = subprocess.run([TOOLS / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
    told = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", done.stderr, re.DOTALL
    )
    loops = dict(_loops(code))
    return [
        Assembled(_instance(name), int(registers), int(spilled), loops.get(name, 0))
        for name, spilled, registers in told
    ]


def _instance(name: str) -> str:
    """`few_rows<2, 2, true, 1>` of the name that the compiler gives it."""
    kernel, arguments = re.search(r"N4eora\d+((?:few|many)_rows)I((?:L[ib]\d+E)+)E", name).groups()  # type: ignore[union-attr]
    values = [
        ("false", "true")[int(value)] if kind == "b" else value
        for kind, value in re.findall(r"L([ib])(\d+)E", arguments)
    ]
    return f"{kernel}<{', '.join(values)}>"


def _loops(code: str) -> list[tuple[str, int]]:
    """Of each kernel in `nvdisasm -c`, the instructions of its shortest loop with products of tensor cores."""
    found = []
    for section in re.split(r"^\.text\.", code, flags=re.MULTILINE)[1:]:
        labels: dict[str, int] = {}
        instructions: list[str] = []
        for line in section.splitlines():
            label = re.match(r"(\.L_x_\d+):", line)
            if label:
                labels[label[1]] = len(instructions)
            elif re.match(r"\s+/\*[0-9a-f]+\*/", line):
                instructions.append(line)
        lengths = []
        for place, text in enumerate(instructions):
            jump = re.search(r"BRA.*(\.L_x_\d+)", text)
            start = labels.get(jump[1], place + 1) if jump else place + 1
            if start <= place and any("MMA" in one for one in instructions[start : place + 1]):
                lengths.append(place + 1 - start)
        if lengths:
            found.append((section.split(":", 1)[0], min(lengths)))
    return found


def main() -> None:
    """Print a table of all instances and architectures."""
    spilling = 0
    print(f"{'capability':10} {'kernel':26} {'registers':>9} {'spilled':>7} {'loop':>5} {'a weight':>8}")
    for capability in CAPABILITIES:
        for one in assembled(capability):
            spilling += one.spilled > 0
            weight = "" if one.per_weight is None else f"{one.per_weight:.2f}"
            name = f"{capability[0]}.{capability[1]}"
            print(f"{name:10} {one.name:26} {one.registers:9} {one.spilled:7} {one.loop:5} {weight:>8}", flush=True)
    raise SystemExit(f"{spilling} kernels spill" if spilling else None)


if __name__ == "__main__":
    main()
