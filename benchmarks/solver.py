"""How fast and how exact is the solver, and what does `generate` cost, beside GPTQModel's own EoRA?

speed      `solve.eora` against `eora_compute_lora`: same tensors, one process, one thread, rank 64
modules    weighted error over the optimum on every linear of the model: real ΔW, real C
synthetic  the same for second moments of condition 1e12, and with channels 1,000 times larger
generate   `GPTQModel.adapter.generate` end to end on one checkpoint: seconds, peak memory, where the time goes

Each part's result is kept on its own, so that parts can be run one by one. Of another model than SmolLM2, `modules` and
`generate` can be measured, which use it.

    python benchmarks/solver.py --json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import common
import generate
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.eora.eora import eora_compute_lora

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.hosts.gptqmodel import compensation as processors
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.solve import energy_left, eora, weighted_energy

RANK = 64
# out × in, and how many times faster than stock the solver has to be there.
SHAPES = {(1024, 1024): 12, (4096, 1024): 6, (1024, 4096): 60, (4096, 4096): 100, (3072, 8192): 120}
# Repeats of both contenders, interleaved; stock takes minutes where it takes long.
REPEATS = {1024: 5, 4096: 2, 8192: 1}
# Eigenvalues of the second moment fall as 1 / i, as those of language models' activations do.
DECAY = -1.0
REFLECTIONS = 16
MODULE_RANKS = (16, 64)
SAMPLES, SEQLEN = 32, 256


def rotated(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A second moment with these eigenvalues, rotated by random reflections; float64."""
    generator = torch.Generator().manual_seed(seed)
    moment = torch.diag(values.to(torch.float64))
    for _ in range(REFLECTIONS):
        normal = torch.randn(len(values), generator=generator, dtype=torch.float64)
        normal /= normal.norm()
        moment -= 2 * torch.outer(normal, normal @ moment)
        moment -= 2 * torch.outer(moment @ normal, normal)
    return (moment + moment.T) / 2


def error(out_features: int, in_features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.01 * torch.randn(out_features, in_features, generator=generator)


def least(delta: torch.Tensor, second_moment: torch.Tensor, rank: int) -> tuple[float, float]:
    """Weighted energy that the best correction leaves, and the energy without one, in float64."""
    delta, second_moment = delta.double(), second_moment.double()
    if delta.shape[0] <= delta.shape[1]:
        gram = delta @ second_moment @ delta.T
    else:
        values, vectors = torch.linalg.eigh(second_moment)
        image = delta @ (vectors * values.clamp_min(0).sqrt())
        gram = image.T @ image
    values = torch.linalg.eigvalsh((gram + gram.T) / 2).clamp_min(0)
    return float(values[: max(len(values) - rank, 0)].sum()), float(values.sum())


def excess(delta: torch.Tensor, second_moment: torch.Tensor, rank: int) -> float:
    """Weighted error of the solver's factors over the least."""
    best, _ = least(delta, second_moment, rank)
    lora_A, lora_B = eora(delta, second_moment, rank)
    found = weighted_energy(delta.double() - lora_B.double() @ lora_A.double(), second_moment.double())
    return found / best if best > 0 else 1.0


def speed() -> dict[str, Any]:
    """Median seconds of both at each shape, one thread."""
    rows = []
    threads = torch.get_num_threads()
    for (out_features, in_features), wanted in SHAPES.items():
        delta = error(out_features, in_features)
        second_moment = rotated(torch.arange(1, in_features + 1, dtype=torch.float64) ** DECAY).float()
        best, energy = least(delta, second_moment, RANK)
        torch.set_num_threads(1)
        seconds: dict[str, list[float]] = {"ours": [], "stock": []}
        eora(error(256, 256), torch.eye(256), RANK)  # LAPACK and thread pools start up once
        for _ in range(REPEATS[max(out_features, in_features)]):
            with quiet():
                seconds["stock"].append(timed(lambda: stock(delta, second_moment)))  # noqa: B023
            # The short one is repeated for its noise; the faster half is not picked, the median is.
            seconds["ours"] += [timed(lambda: eora(delta, second_moment, RANK)) for _ in range(3)]  # noqa: B023
        torch.set_num_threads(threads)
        ours, theirs = (sorted(seconds[kind])[len(seconds[kind]) // 2] for kind in ("ours", "stock"))
        left = energy_left(delta, second_moment, *eora(delta, second_moment, RANK), energy)
        rows.append(
            {
                "out": out_features,
                "in": in_features,
                "ours seconds": ours,
                "stock seconds": theirs,
                "times faster": theirs / ours,
                "wanted": wanted,
                "error over the least": left / best,
            }
        )
    return {"rank": RANK, "rows": rows}


def stock(delta: torch.Tensor, second_moment: torch.Tensor) -> Any:
    return eora_compute_lora(
        w_wq_delta=delta,
        name="benchmark",
        eigen_scaling_diag_matrix=second_moment,
        rank=RANK,
        dtype=torch.float16,
        device=torch.device("cpu"),
    )


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def modules(base: common.Subject) -> dict[str, Any]:
    """The excess on every module of a 2-bit run, in the loop's own ΔW and C."""
    found: dict[str, dict[int, float]] = {}
    compensate = processors.compensate

    def measured(weight: torch.Tensor, quantized: torch.Tensor, moment: Any, recipe: Any, **options: Any) -> Any:
        delta = weight.float() - quantized.float()
        found[options["name"]] = {rank: excess(delta, moment.mean(), rank) for rank in MODULE_RANKS}
        return compensate(weight, quantized, moment, recipe, **options)

    processors.compensate = measured
    try:
        with quiet():
            model = GPTQModel.load(str(base.folder), QuantizeConfig(bits=2, group_size=64))
            calibration = common.calibration(base, SAMPLES, SEQLEN)
            model.quantize(calibration, batch_size=common.BATCH_SIZE, adapter=EoRA(rank=RANK))
    finally:
        processors.compensate = compensate
    largest = {rank: max(found, key=lambda name: found[name][rank]) for rank in MODULE_RANKS}
    return {
        "modules": len(found),
        "largest": {str(rank): {"module": name, "error over the least": found[name][rank]}
                    for rank, name in largest.items()},
    }  # fmt: skip


def synthetic() -> dict[str, Any]:
    """The excess on hard second moments, by rank."""
    outliers = torch.ones(1024, dtype=torch.float64)
    outliers[::200] = 1000
    decaying = rotated(torch.arange(1, 1025, dtype=torch.float64) ** DECAY)
    moments = {
        "flat": torch.eye(1024, dtype=torch.float64),
        "decaying": decaying,
        "condition 1e12": rotated(torch.logspace(0, -12, 1024, dtype=torch.float64)),
        "outliers × 1000": outliers[:, None] * decaying * outliers[None, :],
    }
    found = {
        name: {
            f"{out_features} × 1024, rank {rank}": excess(error(out_features, 1024), moment, rank)
            for out_features in (512, 1024, 2048)
            for rank in (1, 16, 64)
        }
        for name, moment in moments.items()
    }
    return {"excess": found}


MODEL_PARTS: dict[str, Callable[[common.Subject], dict[str, Any]]] = {"modules": modules, "generate": generate.measure}
PARTS: dict[str, Callable[[], dict[str, Any]]] = {"speed": speed, "synthetic": synthetic}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, *MODEL_PARTS])
    common.add_model(parser)
    options = parser.parse_args()
    with common.subject(options) as base:
        path = base.results("solver")
        result = common.kept(path)
        for part in common.parts(options.parts, PARTS, MODEL_PARTS, base):
            found = PARTS[part]() if part in PARTS else MODEL_PARTS[part](base)
            result[part] = {"measured": common.measured(base if part in MODEL_PARTS else None), **found}
            common.keep(path, result)
    common.keep(path, result, as_json=options.json)
    if "speed" in result:
        rows = result["speed"]["rows"]
        common.table(tuple(rows[0]), [list(row.values()) for row in rows])
    if "modules" in result:
        print(result["modules"]["largest"])
    if "synthetic" in result:
        rows = [[name, max(found.values())] for name, found in result["synthetic"]["excess"].items()]
        common.table(("second moment", "largest error over the least"), rows)
    if "generate" in result:
        generate.show(result["generate"])


if __name__ == "__main__":
    main()
