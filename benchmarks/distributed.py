"""What several processes share, counted and compared: operations of each, bytes sent, seconds, and whether the
checkpoints are the same.

    python benchmarks/distributed.py                # SmolLM2; writes results/distributed.json
    python benchmarks/distributed.py --parts counts --adapters rank
    python benchmarks/distributed.py --layers 2 --samples 4 --seqlen 64   # a dry run

Operations are counted, not timed: two for each multiplication of a matrix product, and what LAPACK's working notes
count for Cholesky, inverse, QR and eigenvalues. "capture" are the layers' forwards and the sums of inputs, "solve" is
GPTQ and the adapter; a budget's survey is not counted. They are counted with 1, 2 and 4 processes. One process has two
threads, each of several has one: one and two are timed, which wants two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import common
import torch
from common import Subject, add_model, calibration, scratch, subject
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.looper.module_looper import ModuleLooper
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.hosts.gptqmodel.distributed import SharedCompensation
from gptqmodel_eora_ext.hosts.gptqmodel.guard import Guarded
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.system.distributed import is_first, joined
from gptqmodel_eora_ext.system.files import write_json

GROUP_SIZE, BITS, RANK = 64, 2, 32
# One process of two threads stands beside two of one.
THREADS_ALONE = 2
PARTS, ADAPTERS = ("times", "counts"), ("rank", "budget")
# Numbers of processes whose operations are counted.
COUNTED = (1, 2, 4)
# Each process's share of the operations may differ from 1/N by so much.
TOLERANCE = 0.1
aten = torch.ops.aten


def _cube(share: float) -> Any:
    """Operations of a routine on n × n matrices: ``share`` times n³."""
    return lambda shape, *args, out_shape=None, **kwargs: int(share * shape[-1] ** 3)


def _qr(shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    rows, columns = max(shape[-2:]), min(shape[-2:])
    return int(4 * rows * columns**2 - 4 / 3 * columns**3)


# Besides those that torch counts. The eigenvalues' 9 n³ are those of the symmetric QR method with vectors.
ROUTINES = {
    aten.linalg_cholesky_ex: _cube(1 / 3),
    aten.cholesky_inverse: _cube(2 / 3),
    aten._linalg_eigh: _cube(9),
    aten.linalg_qr: _qr,
}
FORMULAS = {**flop_registry, **{routine: shape_wrapper(count) for routine, count in ROUTINES.items()}}


class Operations(TorchDispatchMode):
    """Counts the operations within its block, as torch's `FlopCounterMode` does, at a sixth of what that one costs.

    GPTQ calls millions of small functions; which of them are made of others is asked once.
    """

    _whole: ClassVar[set[Any]] = set()

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None and func not in self._whole:
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
            self._whole.add(func)
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


class Counted:
    """Counts operations of functions, in whichever thread they run."""

    def __init__(self) -> None:
        self.operations: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._inside = threading.local()

    def watch(self, owner: Any, name: str, kind: str) -> None:
        """Count a method's operations as ``kind``; those of a watched method inside another count once."""
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "yes", False):
                return original(*args, **kwargs)
            self._inside.yes = True
            try:
                with Operations() as counter:
                    return original(*args, **kwargs)
            finally:
                self._inside.yes = False
                with self._lock:
                    self.operations[kind] += counter.total

        setattr(owner, name, counted)


def run_one(options: argparse.Namespace) -> None:
    """One process's part, started by `measure`: quantise, save, and leave what was counted in the output's folder."""
    counted = Counted()
    if options.count:
        counted.watch(ModuleLooper, "_run_forward_batches", "capture")
        counted.watch(SharedCompensation, "end_shared_input_capture", "capture")
        counted.watch(Guarded, "process", "solve")
    folder = Path(options.output)
    with quiet(), joined() as group:
        model = Subject("the model", Path(options.model), calibration=options.calibration)
        data = calibration(model, options.samples, options.seqlen)
        start = time.perf_counter()
        host = GPTQModel.load(options.model, QuantizeConfig(bits=BITS, group_size=GROUP_SIZE))
        adapter = EoRA() if options.adapter == "budget" else EoRA(rank=RANK)
        host.quantize(data, batch_size=1, adapter=adapter)
        host.save(str(folder / "checkpoint"))
        told = {
            "seconds": time.perf_counter() - start,
            "operations": dict(counted.operations),
            "bytes sent": 0 if group is None else group.sent,
        }
        rank = 0 if group is None else group.rank
        write_json(folder / f"{rank}.json", told)
        if is_first():
            write_json(folder / "layers.json", {"layers": host.model.config.num_hidden_layers})


def measure(options: argparse.Namespace, model: Path, processes: int, adapter: str, folder: Path, count: bool) -> Any:
    """Start so many processes, and gather what they have left."""
    folder.mkdir()
    command = [str(Path(__file__).resolve()), "--output", str(folder), "--model", str(model), "--adapter", adapter,
               "--samples", str(options.samples), "--seqlen", str(options.seqlen),
               "--calibration", options.calibration, *(["--count"] if count else [])]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    threads = "1" if processes > 1 else str(THREADS_ALONE)
    # An empty cache, so that every run measures sensitivities itself.
    env = {**os.environ, "OMP_NUM_THREADS": threads, "XDG_CACHE_HOME": str(folder / "cache")}
    start = time.perf_counter()
    subprocess.run([sys.executable, *launcher, *command], env=env, check=True)
    each = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return {"processes": processes, "threads each": int(threads), "wall seconds": time.perf_counter() - start,
            "each": each, "layers": json.loads((folder / "layers.json").read_text())["layers"]}  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((folder / "checkpoint").rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {f"{path.parent.name} {key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def compared(one: Path, several: Path) -> dict[str, Any]:
    """How the checkpoint of several processes differs from that of one."""
    expected, found = tensors(one), tensors(several)
    told, again = (
        json.loads((folder / "checkpoint/eora/eora.json").read_text())["modules"] for folder in (one, several)
    )
    differing = [name for name in expected if name not in found or not torch.equal(expected[name], found[name])]
    errors = [abs(told[name]["error_after"] / again[name]["error_after"] - 1) for name in told]
    return {
        "tensors": len(expected),
        "tensors that differ": len(differing) + len(set(found) - set(expected)),
        "same ranks": all(told[name]["rank"] == again[name]["rank"] for name in told),
        "largest difference of a module's weighted error": max(errors),
    }


def shares(one: dict[str, Any], several: dict[str, Any]) -> dict[str, float]:
    """The busiest process's operations over 1/N of those of one process."""
    found = {}
    for kind, total in one["each"][0]["operations"].items():
        most = max(process["operations"].get(kind, 0) for process in several["each"])
        found[kind] = most * several["processes"] / total
    return found


def times(options: argparse.Namespace, model: Subject, adapter: str, work: Path) -> dict[str, Any]:
    """One process of two threads and two of one: seconds, and what they have made."""
    one, two = (measure(options, model.folder, count, adapter, work / f"{adapter} {count}", False) for count in (1, 2))
    seconds = [max(process["seconds"] for process in run["each"]) for run in (one, two)]
    return {"seconds": seconds, "time over one process": seconds[1] / seconds[0],
            "compared": compared(work / f"{adapter} 1", work / f"{adapter} 2"),
            "measured": common.measured(model)}  # fmt: skip


def counts(options: argparse.Namespace, model: Subject, adapter: str, work: Path) -> dict[str, Any]:
    """Operations and bytes of each process."""
    runs = [measure(options, model.folder, count, adapter, work / f"{adapter} {count}", True) for count in COUNTED]
    return {"runs": runs, "measured": common.measured(model),
            "busiest over its share": {str(run["processes"]): shares(runs[0], run) for run in runs[1:]}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    parser.add_argument("--adapter", default="rank", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.output:
        run_one(options)
        return
    setup = {"samples": options.samples, "seqlen": options.seqlen, "bits": BITS, "group size": GROUP_SIZE, "rank": RANK}
    with subject(options) as model:
        path = model.results("distributed")
        result = {**common.kept(path, setup), "setup": setup}
        for part in options.parts:
            for adapter in options.adapters:
                with scratch() as work:
                    found = {"times": times, "counts": counts}[part](options, model, adapter, work)
                result.setdefault(part, {})[adapter] = found
                common.keep(path, result)
    for adapter, found in result.get("times", {}).items():
        differing = found["compared"]["tensors that differ"]
        print(f"{adapter}: {differing} tensors differ, {found['time over one process']:.3f} of the time of one process")
    for adapter, found in result.get("counts", {}).items():
        for processes, busiest in found["busiest over its share"].items():
            over = {kind: value for kind, value in busiest.items() if value > 1 + TOLERANCE}
            falls = f"more than 1/N by over {TOLERANCE:.0%}: {over}" if over else "operations fall as 1/N"
            told = ", ".join(f"{kind} {value:.3f}" for kind, value in busiest.items())
            print(f"{adapter}, {processes} processes: {falls} (busiest over 1/N: {told})")


if __name__ == "__main__":
    main()
