"""Does fine-tuning over the plugin's kernels take less time than PEFT over GPTQModel's torch kernel?

One checkpoint of 2 bits, loaded twice in one process: by `GPTQModel.load`, with the plugin's kernels, and with
GPTQModel's torch kernel; `load_peft` puts the same adapter on both. A step is a forward and a backward pass over one
window, and a step of Adam. Steps of both are timed in turns, and their losses compared.

    python benchmarks/finetune.py --layers 4
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import common
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

from gptqmodel_eora_ext import EoRA, load_peft
from gptqmodel_eora_ext.hosts.terminal import quiet

BITS, GROUP_SIZE, RANK = 2, 64, 32
SAMPLES, SEQLEN = 16, 256
WINDOW = 512
# Steps before the clock runs: thread pools start, and packed weights are brought into the kernels' form.
SETTLING = 2
CONTENDERS: dict[str, dict[str, Any]] = {"plugin": {}, "GPTQModel's torch": {"backend": BACKEND.GPTQ_TORCH}}
# In 16 bits the kernels' results differ by rounding: nats a token.
MOST_APART = 0.05


def checkpoint(base: common.Subject, folder: Path) -> Path:
    """The model at 2 bits with an adapter."""
    with quiet():
        model = GPTQModel.load(str(base.folder), QuantizeConfig(bits=BITS, group_size=GROUP_SIZE))
        model.quantize(common.calibration(base, SAMPLES, SEQLEN), adapter=EoRA(rank=RANK), batch_size=4)
        model.save(str(folder))
    return folder


def trainable(folder: Path, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Any]:
    """The model and its optimiser."""
    with quiet():
        model = load_peft(GPTQModel.load(str(folder), dtype=dtype, **options), folder / "eora", is_trainable=True)
    model.train()
    return model, torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5)


def step(model: Any, optimizer: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds and loss of a step."""
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start, float(loss.detach())


def measure(base: common.Subject, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Tokens per second of both, medians of rounds in turns."""
    windows = [torch.tensor([one["input_ids"]]) for one in common.calibration(base, SETTLING + rounds, WINDOW)]
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with common.scratch() as scratch:
        folder = checkpoint(base, scratch / "out")
        models = {name: trainable(folder, dtype, options) for name, options in CONTENDERS.items()}
        for number, ids in enumerate(windows):
            found = {name: step(*pair, ids) for name, pair in models.items()}
            losses = [loss for _, loss in found.values()]
            if max(losses) - min(losses) > MOST_APART:
                raise SystemExit(f"the losses differ: {found}")
            if number >= SETTLING:
                for name, (took, _) in found.items():
                    seconds[name].append(took)
    speed = {name: WINDOW / statistics.median(times) for name, times in seconds.items()}
    first, second = speed.values()
    return {"dtype": str(dtype)[6:], "tokens per second": speed, "ratio": first / second, "seconds": seconds,
            "measured": common.measured(base)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--rounds", type=int, default=7)
    common.add_model(parser)
    options = parser.parse_args()
    with common.subject(options) as base:
        setup = {"bits": BITS, "rank": RANK, "window": WINDOW, "layers": options.layers or "all"}
        # GPTQModel's kernel takes float16 as well, which torch multiplies on a CPU several times as slowly.
        rows = [measure(base, torch.bfloat16, options.rounds)]
    common.keep(base.results("finetune"), {"setup": setup, "rows": rows}, as_json=options.json)
    common.table(
        ("dtype", *(f"{name}, tokens/s" for name in CONTENDERS), "ratio"),
        [(row["dtype"], *row["tokens per second"].values(), row["ratio"]) for row in rows],
    )


if __name__ == "__main__":
    main()
