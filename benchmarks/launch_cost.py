"""What does a call from Python cost before the GPU begins: q, k and v of one layer, whose launches do nothing?

Modules as a host has them, on the CPU, as for Triton's interpreter; in the place of a launch stands a function that
returns. So what is timed is all that Python does for a call: whether the input is shared, whether anything changed,
outputs, arguments. Medians of rounds that take turns.

modules     q, k and v called one after the other: Triton's launches, the compiled launch, three `torch.nn.Linear`
launches    the same weights without modules: one call for all three, and for one

    python benchmarks/launch_cost.py --json

Needs no GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import common
import torch
from gptqmodel.nn_modules.qlinear import BaseQuantLinear  # noqa: F401 (the host, before its kernels)

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.formats.factors import Factors
from gptqmodel_eora_ext.hosts.gptqmodel.triton import EoRATritonLinear
from gptqmodel_eora_ext.kernels.cuda.few_rows import Device, FewRows
from gptqmodel_eora_ext.kernels.cuda.prepare import Compiled
from gptqmodel_eora_ext.kernels.cuda.structures import MOST_MODULES
from gptqmodel_eora_ext.kernels.shared_input import share_inputs
from gptqmodel_eora_ext.kernels.triton import ops

RESULT = common.RESULTS / "launch_cost.json"
IN_FEATURES, GROUP_SIZE, RANK, BITS = 256, 64, 64, 2
OUTS = {"q_proj": 256, "k_proj": 64, "v_proj": 64}
ROUNDS, CALLS = 15, 1000
DTYPE = torch.bfloat16


class Nothing:
    """In the place of the compiled library: launches that return at once."""

    def __init__(self) -> None:
        # `labs` of the C library takes and returns a number; what more it is passed it does not look at.
        for modules in range(1, MOST_MODULES + 1):
            function: Any = ctypes.CDLL(None)["labs"]
            function.argtypes = (ctypes.c_void_p,) * (3 + modules)
            function.restype = None
            setattr(self, f"eora_few_rows_{modules}", function)

    def eora_few_rows_bytes(self, _: Any) -> int:
        return 1


def module(name: str, out: int) -> EoRATritonLinear:
    """As loading leaves it; the weight is of zeros."""
    made = EoRATritonLinear(
        bits=BITS, group_size=GROUP_SIZE, sym=True, desc_act=False, in_features=IN_FEATURES, out_features=out,
        bias=False, pack_dtype=torch.int32, adapter=EoRA(rank=RANK), name=f"attention.{name}",
    )  # fmt: skip
    made.adapter._attach(Factors(torch.zeros(RANK, IN_FEATURES, dtype=DTYPE), torch.zeros(RANK, out, dtype=DTYPE)),
                         torch.device("cpu"))  # fmt: skip
    return made.eval()


def nothing(*_: Any) -> None:
    """A launch that does nothing."""


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds a call, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            taken[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return {name: round(statistics.median(times), 2) for name, times in taken.items()}


def with_compiled(stacked: ops.StackedLinears) -> ops.StackedLinears:
    """The same weights with the compiled launch, which does nothing here."""
    device = Device(Nothing(), processors=132, memory=1 << 18, hopper=False)  # type: ignore[arg-type]
    return replace(stacked, compiled=Compiled(FewRows(stacked, device), None))


def three_modules(*, compiled: bool) -> Callable[[torch.Tensor], Any]:
    """q, k and v, one after the other."""
    modules = {f"attention.{name}": module(name, out) for name, out in OUTS.items()}
    share_inputs(modules)
    if compiled:
        shared = next(iter(modules.values())).shared
        assert shared._prepared is not None and isinstance(shared._prepared.joint, ops.StackedLinears)
        shared._prepared = replace(shared._prepared, joint=with_compiled(shared._prepared.joint))
    q, k, v = modules.values()
    return lambda x: (q(x), k(x), v(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ops.launch = nothing
    with torch.no_grad():
        x = torch.zeros(1, 1, IN_FEATURES, dtype=DTYPE)
        one, three, dense = (three_modules(compiled=False), three_modules(compiled=True),
                             [torch.nn.Linear(IN_FEATURES, 8, False, dtype=DTYPE) for _ in OUTS])  # fmt: skip
        made = [module(name, out) for name, out in OUTS.items()]
        stacked = {"q, k, v": EoRATritonLinear.join(made), "q": EoRATritonLinear.join(made[:1])}
        calls: dict[str, Callable[[], Any]] = {
            "modules, Triton's": lambda: one(x),
            "modules, compiled": lambda: three(x),
            "modules, three of 8 outputs, dense": lambda: [layer(x) for layer in dense],
        }
        for name, joint in stacked.items():
            assert isinstance(joint, ops.StackedLinears)
            calls[f"launches, {name}, Triton's"] = partial(joint, x)
            calls[f"launches, {name}, compiled"] = partial(with_compiled(joint), x)
        microseconds = medians(calls)
    common.keep(RESULT, {"measured": common.measured(), "µs": microseconds}, as_json=options.json)
    common.table(("call", "µs"), list(microseconds.items()))


if __name__ == "__main__":
    main()
